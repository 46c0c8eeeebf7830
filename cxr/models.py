"""Networks, one builder function each: an image in [0, 255] goes in, the probability of pneumonia comes out.

Every network takes float or uint8 `(batch, size, size, 1)` in [0, 255], scales it itself, and ends in a layer named
`logit` followed by a sigmoid in float32, so that explanations can differentiate the logit. `augmentation` is a list of
Keras layers that act on [0, 1] while training only; they run inside the compiled step.
"""

import keras
from keras import layers


@keras.saving.register_keras_serializable("cxr")
class TrainingOnly(layers.Layer):
    """Apply `stack` (a list of layers) while training and do nothing otherwise.

    Keras's own random layers also act when a model is simply called, which would blur an explanation or a served model.
    """

    def __init__(self, stack, **kwargs):
        super().__init__(**kwargs)
        self.stack = list(stack)

    def build(self, input_shape):
        """Build every layer; none of them changes the shape."""
        for layer in self.stack:
            layer.build(input_shape)

    def call(self, images, training=False):
        """Return `images`, changed while training."""
        for layer in self.stack if training else ():
            images = layer(images, training=True)
        return images

    def get_config(self):
        """Return what rebuilds the layer."""
        return super().get_config() | {"stack": [keras.saving.serialize_keras_object(layer) for layer in self.stack]}

    @classmethod
    def from_config(cls, config):
        """Return the layer that `get_config` described."""
        return cls([keras.saving.deserialize_keras_object(layer) for layer in config.pop("stack")], **config)


def image_input(image_size, augmentation, channels=1):
    """Return the input tensor and the scaled, augmented image with `channels` equal channels."""
    inputs = keras.Input((image_size, image_size, 1), name="image")
    x = layers.Rescaling(1 / 255)(inputs)
    x = TrainingOnly(augmentation, name="augmentation")(x) if augmentation else x
    return inputs, layers.Concatenate()([x] * channels) if channels > 1 else x


def classifier(inputs, x, name):
    """Return the model that ends in `logit` and a sigmoid."""
    logit = layers.Dense(1, name="logit", dtype="float32")(x)
    return keras.Model(inputs, layers.Activation("sigmoid", dtype="float32", name="probability")(logit), name=name)


def seed_cnn(image_size=180, augmentation=()):
    """Return study S2's CNN as published: separable blocks, a flattened 512–128–64 head with dropout 0.7 / 0.5 / 0.3.

    Source: the Keras pneumonia tutorial of 2020, as study S2 uses it.
    """
    inputs, x = image_input(image_size, augmentation, channels=3)
    for _ in range(2):
        x = layers.Conv2D(16, 3, padding="same", activation="relu")(x)
    x = layers.MaxPooling2D()(x)
    for filters, dropout in ((32, 0), (64, 0), (128, 0.2), (256, 0.2)):
        for _ in range(2):
            x = layers.SeparableConv2D(filters, 3, padding="same", activation="relu")(x)
        x = layers.BatchNormalization()(x)
        x = layers.MaxPooling2D()(x)
        x = layers.Dropout(dropout)(x) if dropout else x
    x = layers.Flatten()(x)
    for units, dropout in ((512, 0.7), (128, 0.5), (64, 0.3)):
        x = layers.Dense(units, activation="relu")(x)
        x = layers.BatchNormalization()(x)
        x = layers.Dropout(dropout)(x)
    return classifier(inputs, x, "seed_cnn")


def s4_cnn(image_size=128, augmentation=()):
    """Return study S4's CNN: convolutions of 32, 64, 128, 128 with three poolings, Dense 128 and 64, 4.44 M parameters.

    The study's picture of it is lost; kernels of 3 and same padding give the number of parameters that it reports.
    """
    inputs, x = image_input(image_size, augmentation)
    for filters in (32, 64, 128):
        x = layers.MaxPooling2D()(layers.Conv2D(filters, 3, padding="same", activation="relu")(x))
    x = layers.Flatten()(layers.Conv2D(128, 3, padding="same", activation="relu")(x))
    for units in (128, 64):
        x = layers.Dense(units, activation="relu")(x)
    return classifier(inputs, x, "s4_cnn")


def _conv(x, filters, kernel=3, strides=1, activation=True):
    """Return convolution, batch normalisation and (unless told otherwise) ReLU.

    Keras's momentum of 0.99 lags hundreds of steps behind the weights, more than an epoch of a set this small has.
    """
    x = layers.Conv2D(filters, kernel, strides, padding="same", use_bias=False, kernel_initializer="he_normal")(x)
    x = layers.BatchNormalization(momentum=0.9)(x)
    return layers.ReLU()(x) if activation else x


def _residual(x, filters, strides=1):
    """Return a basic residual block (He et al. 2016)."""
    shortcut = x if strides == 1 and x.shape[-1] == filters else _conv(x, filters, 1, strides, activation=False)
    x = _conv(_conv(x, filters, 3, strides), filters, activation=False)
    return layers.ReLU()(layers.Add()([x, shortcut]))


def lab_cnn(image_size=96, augmentation=()):
    """Return the lab's small CNN: each image standardised, a strided stem, four widths, global average pooling.

    Pooling instead of flattening leaves no weight that could learn where in the frame a class tends to lie.
    """
    inputs, x = image_input(image_size, augmentation)
    x = layers.LayerNormalization(axis=[1, 2, 3], epsilon=1e-6, center=False, scale=False, name="standardise")(x)
    x = layers.MaxPooling2D()(_conv(_conv(x, 24, 5, strides=2), 32))
    for filters in (64, 128):
        x = layers.MaxPooling2D()(_conv(_conv(x, filters), filters))
    x = _conv(x, 192)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dropout(0.3)(x)
    return classifier(inputs, x, "lab_cnn")


def resnet18(image_size=180, augmentation=()):
    """Return ResNet18 with one logit: 7×7/2 stem, stages of [2, 2, 2, 2] basic blocks, 11.19 million parameters.

    Source: He et al. 2016; study S2.
    """
    inputs, x = image_input(image_size, augmentation, channels=3)
    x = layers.MaxPooling2D(3, 2, padding="same")(_conv(x, 64, 7, strides=2))
    for filters, strides in ((64, 1), (128, 2), (256, 2), (512, 2)):
        x = _residual(_residual(x, filters, strides), filters)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return classifier(inputs, x, "resnet18")
