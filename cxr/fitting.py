"""One training: the recipe, the compiled step, early stopping, and exact resuming from the last epoch."""

import dataclasses
import pathlib
import time

import keras
import numpy as np
from sklearn import metrics

from cxr import augment
from cxr.backup import back_up, load, restore, state_of
from cxr.device import compiled_once, copy_state, num_devices, predict
from cxr.objective import DiscriminativeAdamW, HardAUC, WeightedBinaryCrossentropy, class_weights

CHOICES = {"schedule": {"constant", "cosine", "step"}, "select": {"last", "best"},
           "monitor": {"val_auc", "shifted_auc"}, "split": {"patient", "image"},
           "balance": {"none", "class_weight", "loss_1.5", "oversample", "offline"},
           # the last two are painted by the caller before training (`extra`, `images`)
           "augment": {*augment.STRATEGIES, *augment.OTHERS, *augment.BEFOREHAND}}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a training, besides data and seed. It is what the record's `config` holds.

    Attributes:
        model: name of the builder function, for the reader.
        image_size: side of the square image in pixels.
        epochs: largest number of epochs.
        batch_size: images a step.
        learning_rate: of Adam (its peak, under `cosine`).
        schedule: `constant`; `cosine`: one epoch of linear warm-up, then a half cosine to zero; `step`: a tenth every
            seven epochs (study S1).
        backbone_rate: learning rate of everything but the classifier, as a share of `learning_rate`.
        weight_decay: decoupled, as in AdamW; 0 is plain Adam.
        balance: `none`; `class_weight` (n / 2n_c); `loss_1.5` (study S1's 1 : 1.5); `oversample` (minority repeated to
            1 : 1); `offline` (the caller adds images, see `repeat`).
        augment: a strategy's name, see `augment.stack`.
        mixing: `[mode, ratio]` of `augment.mix`, or `None`.
        select: `last` epoch, or the `best` on `monitor`.
        monitor: `val_auc`, or `shifted_auc`: AUC on the shifted validation images.
        patience: epochs without a better `monitor` after which training stops, or `None`.
        split: `patient` (the protocol) or `image` (as the studies split, shares patients).
        weights: name of the weights it starts from, or `None`.
        backbone, strategy, domain: of `transfer.build`, or `None`.
    """

    model: str
    image_size: int
    epochs: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    schedule: str = "constant"
    weight_decay: float = 0.0
    balance: str = "none"
    augment: str = "none"
    mixing: tuple | None = None
    select: str = "best"
    monitor: str = "val_auc"
    patience: int | None = None
    split: str = "patient"
    weights: str | None = None
    backbone: str | None = None
    strategy: str | None = None
    backbone_rate: float = 1.0
    domain: tuple | None = None

    def __post_init__(self):
        """Refuse a word that nothing here knows: what it stands for would silently be left out."""
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"Recipe({name}={getattr(self, name)!r}): choose one of {', '.join(sorted(known))}.")

    def config(self):
        """Return the record's `config`: what identifies a recipe, and whatever differs from the default.

        A field that is added later, at its default, leaves the ids of finished records as they are.
        """
        always = {"model", "image_size", "epochs", "batch_size", "learning_rate", "balance", "augment", "split",
                  "weights"}
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                if field.name in always or getattr(self, field.name) != field.default}


def _as_input(images):
    """Return uint8 images `(n, size, size)` with their one channel; activations as they are, in float32."""
    return images[..., None] if images.dtype == "uint8" else np.asarray(images, "float32")


class Batches(keras.utils.PyDataset):
    """Shuffled batches whose order and mixing depend on seed and epoch alone, so that a resumed run sees the same ones.

    Args:
        images: uint8 `(n, size, size)`, or float activations of `transfer.run_once`.
        labels: float `(n,)` in [0, 1].
        batch_size: images a step; a last batch of one image is left out (it has no batch statistics). Where
            `keras.distribution` splits batches among devices, what does not split evenly is left out too.
        seed: int.
        mixing: `(mode, ratio)` of `augment.mix`, or `None`.
        epoch: first epoch, above 0 when resuming.
    """

    def __init__(self, images, labels, batch_size, seed, mixing=None, epoch=0):
        super().__init__()
        if len(images) < 2 or batch_size < 2:
            raise ValueError(f"Training needs at least two images a batch; got {len(images)} images and "
                             f"batch_size={batch_size}. Batch statistics and mixing are undefined for one.")
        self.devices = num_devices()
        if batch_size % self.devices:
            raise ValueError(f"batch_size={batch_size} cannot be split among {self.devices} devices; take a multiple.")
        self.images, self.labels = images, np.asarray(labels, "float32")
        self.batch_size, self.seed, self.mixing, self.epoch = batch_size, seed, mixing, epoch
        self.shuffle()

    def shuffle(self):
        """Draw the order of `epoch`."""
        self.order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.images))

    def __len__(self):
        return len(self.images) // self.batch_size + (len(self.images) % self.batch_size >= max(2, self.devices))

    def __getitem__(self, index):
        rows = self.order[index * self.batch_size:(index + 1) * self.batch_size]
        rows = rows[:len(rows) // self.devices * self.devices]
        images, labels = _as_input(self.images[rows]), self.labels[rows][:, None]
        if self.mixing:
            images, labels = augment.mix(images, labels, *self.mixing, seed=[self.seed, self.epoch, index])
        return images, labels

    def on_epoch_end(self):
        """Draw the next epoch's order."""
        self.epoch += 1
        self.shuffle()


class Watch(keras.callbacks.Callback):
    """Score the watched sets after each epoch, keep the best weights, stop early, and back everything up to resume.

    Args:
        watched: dict name → `(images, labels)`, such as `val`. History gets `<name>_loss`, `_auc`, `_accuracy`.
        recipe: the `Recipe`.
        folder: where the backup lies until the run is finished.
    """

    def __init__(self, watched, recipe, folder):
        super().__init__()
        self.watched, self.recipe, self.folder = watched, recipe, pathlib.Path(folder)
        self.history, self.best_epoch = {}, None
        self.began = time.monotonic() - state_of(self.folder).get("seconds", 0.0)

    def restore(self, model):
        """Load the backup into `model`, if there is one, and return the epoch to go on with."""
        state = restore(model, self.folder)
        self.history, self.best_epoch = state.get("history", {}), state.get("best_epoch")
        return state.get("epoch", 0)

    def finished(self, epoch):
        """Return whether training ends after `epoch` epochs: all done, or `patience` without a better monitor."""
        patience = self.recipe.patience
        return epoch >= self.recipe.epochs or bool(patience and epoch and epoch - self.best_epoch >= patience)

    def on_epoch_end(self, epoch, logs=None):
        """Score, remember, back up, and stop when `finished`."""
        for name, value in ({"loss": logs["loss"], "auc": logs["auc"]} | self._scores()).items():
            self.history.setdefault(name, []).append(round(float(value), 6))
        monitored = self.history[self.recipe.monitor]
        self.best_epoch = int(np.argmax(monitored)) + 1
        logs.update({name: values[-1] for name, values in self.history.items()})
        back_up(self.model, self.folder, epoch + 1, keep=(epoch + 1, self.best_epoch), history=self.history,
                best_epoch=self.best_epoch, seconds=round(time.monotonic() - self.began, 2))
        self.model.stop_training = self.finished(epoch + 1)

    def _scores(self):
        scores = {}
        for name, (images, labels) in self.watched.items():
            y_score = predict(self.model, images)
            scores[f"{name}_loss"] = metrics.log_loss(labels, np.clip(y_score, 1e-7, 1 - 1e-7), labels=[0, 1])
            scores[f"{name}_auc"] = metrics.roc_auc_score(labels, y_score)
            scores[f"{name}_accuracy"] = np.mean((y_score >= 0.5) == labels)
        return scores


def _compile(model, recipe, labels, steps):
    """Return a compiled copy of `model`, as `compiled_once` does."""
    negative, positive = class_weights(labels, recipe.balance)
    loss = WeightedBinaryCrossentropy(float(negative), float(positive))
    rate = recipe.learning_rate
    if recipe.schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(0.0, max(1, steps * (recipe.epochs - 1)),
                                                      warmup_target=rate, warmup_steps=steps)
    if recipe.schedule == "step":
        rate = keras.optimizers.schedules.ExponentialDecay(rate, 7 * steps, 0.1, staircase=True)
    optimizer = DiscriminativeAdamW(rate, decoupled_decay=recipe.weight_decay, backbone_rate=recipe.backbone_rate)
    return compiled_once(model, optimizer, loss, metrics=[HardAUC(name="auc")])


def fit(model, recipe, images, labels, watched, *, seed, folder):
    """Train `model` by `recipe`, going on from the backup in `folder` if there is one.

    Args:
        model: uncompiled `keras.Model` ending in one probability.
        recipe: `Recipe`.
        images: uint8 `(n, size, size)`, or activations, which `model` then takes.
        labels: 0/1 int `(n,)`.
        watched: see `Watch`.
        seed: of the order of batches and of mixing.
        folder: of the backup; left for the caller to remove once the result is safe.

    Returns:
        `(history, compiled)`: dict of per-epoch lists, and a model equal to `model` that need not be traced again for
        predictions. Both hold the selected weights; `compiled` only until the next `fit`.

    Raises:
        ValueError: a class without images, or fewer than two images a batch.
    """
    labels = np.asarray(labels)
    for part, values in {"train": labels, **{name: pair[1] for name, pair in watched.items()}}.items():
        if len(np.unique(values)) < 2:
            raise ValueError(f"The {part} set holds {len(values)} images of one class only; both are needed. "
                             "Check the class folders of the data source, or the split.")
    if recipe.balance == "oversample":
        minority = np.flatnonzero(labels == (np.mean(labels) < 0.5))
        extra = np.resize(np.random.default_rng(seed).permutation(minority), len(labels) - 2 * len(minority))
        images, labels = images[np.r_[:len(labels), extra]], labels[np.r_[:len(labels), extra]]
    watch = Watch(watched, recipe, folder)
    batches = Batches(images, labels, recipe.batch_size, seed, recipe.mixing)
    trained = _compile(model, recipe, labels, len(batches))
    batches.epoch = epoch = watch.restore(trained)
    batches.shuffle()
    if not watch.finished(epoch):
        trained.fit(batches, epochs=recipe.epochs, initial_epoch=epoch, callbacks=[watch], verbose=2,
                    shuffle=False)  # Batches has drawn the order; Keras would draw another one that a resumed run lacks
    if recipe.select == "best":
        load(trained, watch.folder, watch.best_epoch)
    copy_state(trained, model)
    return watch.history, trained
