"""Files that training leaves behind: a model whole or not at all, and a backup after each epoch to resume from."""

import json
import zipfile

import numpy as np
from keras import ops

from cxr import records


def _variables(model):
    """Return what a resumed training must find as it was: weights, random states, and those of the optimizer."""
    return [*model.variables, *model.optimizer.variables]


def back_up(model, folder, epoch, *, keep, **state):
    """Write all that `model` holds and `state` (what JSON can hold) after `epoch` epochs into `folder`.

    The arrays lie in the model's own order: Keras's weight files leave random states out, and take three times as long
    to find what belongs to each layer. The backups of the epochs in `keep` stay, those of others go.
    """
    arrays = [ops.convert_to_numpy(variable) for variable in _variables(model)]
    records.save_atomic(lambda path: np.savez(path, *arrays), folder / f"{epoch}.npz")
    records.write_atomic(folder / "history.json", json.dumps(state | {"epoch": epoch}))
    for path in folder.glob("*.npz"):
        if path.name not in {f"{kept}.npz" for kept in keep}:
            path.unlink()


def state_of(folder):
    """Return the `state` of the last backup in `folder`, with `epoch`; empty where none is."""
    index = folder / "history.json"
    return json.loads(index.read_text()) if index.exists() else {}


def load(model, folder, epoch):
    """Give a compiled model what it held after `epoch`, one of the backups in `folder`.

    Raises:
        ValueError: the file is damaged, missing, or of another version that kept other variables.
    """
    path = folder / f"{epoch}.npz"
    try:
        with np.load(path) as file:
            pairs = list(zip(_variables(model), file.values(), strict=True))  # each array is held to its checksum
    except (zipfile.BadZipFile, ValueError, EOFError, FileNotFoundError) as error:
        raise ValueError(f"{path} is damaged or of another version ({error}). Delete {folder} and call again: this run "
                         "begins anew, what is finished is kept.") from error
    for variable, value in pairs:
        variable.assign(value)


def restore(model, folder):
    """Load the last backup in `folder`, if there is one, into a compiled model; return its `state_of`."""
    if state := state_of(folder):
        load(model, folder, state["epoch"])
    return state
