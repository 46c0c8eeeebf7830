"""What a step minimises and how: the weighted loss, training AUC of mixed labels, AdamW at two rates."""

import keras
import numpy as np
from keras import ops

from cxr.device import bare_tensorflow


@keras.saving.register_keras_serializable("cxr")
class WeightedBinaryCrossentropy(keras.losses.Loss):
    """Binary cross-entropy with one weight a class, right for soft labels too.

    Keras's `class_weight` rounds or refuses soft labels. Here the weight stands on each of the two terms:
    `-(w1 y log p + w0 (1 - y) log(1 - p))`, which is `class_weight` for hard labels and the mixture of the two weighted
    losses for mixed ones.
    """

    def __init__(self, negative=1.0, positive=1.0):
        super().__init__(name="loss")
        self.negative, self.positive = negative, positive

    def call(self, y_true, y_pred):
        """Return the loss of each image, float `(batch,)`."""
        y_true = ops.cast(y_true, y_pred.dtype)
        y_pred = ops.clip(y_pred, 1e-7, 1 - 1e-7)
        terms = self.positive * y_true * ops.log(y_pred) + self.negative * (1 - y_true) * ops.log(1 - y_pred)
        return -ops.mean(terms, axis=-1)

    def get_config(self):
        """Return what rebuilds the loss."""
        return {"negative": self.negative, "positive": self.positive}


class HardAUC(keras.metrics.AUC):
    """Training AUC that takes the larger side of a mixed label for its class."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Count a batch: labels float in [0, 1], probabilities."""
        super().update_state(ops.cast(y_true > 0.5, "float32"), y_pred, sample_weight)


def class_weights(labels, balance):
    """Return the loss weights `(negative, positive)` of a balancing rule for 0/1 labels."""
    if balance == "class_weight":
        return tuple(len(labels) / (2 * np.sum(labels == value)) for value in (0, 1))
    return (1.0, 1.5) if balance == "loss_1.5" else (1.0, 1.0)


@keras.saving.register_keras_serializable("cxr")
class Adam(keras.optimizers.Adam):
    """Keras's Adam, which under TensorFlow on processors takes the step of each variable in one kernel.

    Keras spells it out in some twenty operations: a small network is traced in less time so, and a large one walks over
    its weights once. The numbers are the same but for rounding: 1 - 0.999 is taken in float32, where it is 0.00099999.
    """

    def update_step(self, gradient, variable, learning_rate):
        """Update one variable."""
        if not bare_tensorflow():
            return super().update_step(gradient, variable, learning_rate)
        import tensorflow as tf

        index, step = self._get_variable_index(variable), tf.cast(self.iterations.value + 1, "float32")
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle, m=self._momentums[index].value.handle, v=self._velocities[index].value.handle,
            beta1_power=tf.pow(self.beta_1, step), beta2_power=tf.pow(self.beta_2, step),
            lr=tf.cast(learning_rate, "float32"), beta1=self.beta_1, beta2=self.beta_2, epsilon=self.epsilon,
            grad=gradient)


@keras.saving.register_keras_serializable("cxr")
class DiscriminativeAdamW(Adam):
    """AdamW whose learning rate, outside the layer `logit`, is the share `backbone_rate` (Howard & Ruder 2018).

    Keras's AdamW computes a schedule anew for the decay of each variable, a third of the time to trace a small network.
    Here decay takes the rate of the step; the numbers are the same.
    """

    def __init__(self, *args, decoupled_decay=0.0, backbone_rate=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.decoupled_decay, self.backbone_rate = decoupled_decay, backbone_rate

    def get_config(self):
        """Return what rebuilds the optimizer."""
        return super().get_config() | {"decoupled_decay": self.decoupled_decay, "backbone_rate": self.backbone_rate}

    def build(self, variables):
        """Look up the share of each variable once; the steps see the backend's variables, which have no path."""
        super().build(variables)
        self.shares = [1.0 if "logit" in variable.path.split("/") else self.backbone_rate for variable in variables]

    def update_step(self, gradient, variable, learning_rate):
        """Decay one variable, then update it at its own rate."""
        rate, share = ops.cast(learning_rate, variable.dtype), self.shares[self._get_variable_index(variable)]
        if self.decoupled_decay:
            self.assign_sub(variable, variable * self.decoupled_decay * rate)
        super().update_step(gradient, variable, rate * share)
