"""DCGAN: it learns, resumes exactly, stops when it must; and measures that know a copy from a draw."""

import keras
import numpy as np
import pytest

from cxr import device, gan


def blobs(n=64, size=16, seed=0):
    """Bright discs on dark ground, at random places."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    centre = rng.uniform(5, size - 5, (n, 2))
    near = (y - centre[:, :1, None]) ** 2 + (x - centre[:, 1:, None]) ** 2
    return np.uint8(220 * np.exp(-near / 12) + rng.integers(0, 10, (n, size, size)))


def lab(seed=0, size=16, augmentation=()):
    keras.utils.set_random_seed(seed)
    return gan.GAN(gan.lab_generator(size), gan.lab_discriminator(size), augmentation, noise_seed=seed)


def test_published_networks_have_the_published_layers():
    generator, discriminator = gan.seed_generator(128), gan.seed_discriminator(128)
    kinds = [type(layer).__name__ for layer in generator.layers]
    assert kinds.count("Conv2DTranspose") == 4 and generator.output_shape == (None, 128, 128, 1)
    assert [type(layer).__name__ for layer in discriminator.layers].count("Conv2D") == 5
    with pytest.raises(ValueError, match="16, 32, 64 or 128"):
        gan.lab_generator(100)


@pytest.mark.parametrize(("loss", "moved", "still"), [("generator_loss", "generator", "discriminator"),
                                                      ("discriminator_loss", "discriminator", "generator")])
def test_each_loss_moves_only_its_own_network(loss, moved, still, monkeypatch):
    """The generator's loss must not reach the discriminator, nor the other way round."""
    monkeypatch.setattr(gan.GAN, "compute_loss",
                        lambda self, x, y, y_pred, sample_weight=None, training=True: y_pred[loss])
    model, images = lab(), blobs(8)[..., None]
    model.compile(keras.optimizers.SGD(0.1), jit_compile=False)
    model(images)
    biases = {name: [v for v in getattr(model, name).trainable_variables if "kernel" not in v.path]  # spectral
              for name in (moved, still)}  # normalisation divides kernels, whatever the loss
    before = {name: [np.array(v) for v in found] for name, found in biases.items()}
    model.fit(images, epochs=1, batch_size=8, verbose=0)
    same = {name: [(np.array(v) == old).all() for v, old in zip(found, before[name], strict=True)]
            for name, found in biases.items()}
    assert all(same[still]) and len(same[still]) > 1 and not any(same[moved])


def test_training_draws_something_like_the_images(tmp_path):
    images = blobs(128)
    model = lab(augmentation=[keras.layers.RandomTranslation(0.1, 0.1, fill_mode="nearest")])
    history, film = gan.fit(model, images, epochs=25, seed=0, folder=tmp_path, batch_size=32, learning_rate=1e-3,
                            average=0.9)
    assert film.shape == (3, 16, 16, 16) and film.dtype == np.uint8 and len(history["generator_loss"]) == 25
    fakes, noise = gan.sample(model.generator, 64), np.random.default_rng(0).integers(0, 256, (64, 16, 16))
    flat = [rows.reshape(len(rows), -1) / 255 for rows in (blobs(64, seed=1), fakes, noise)]
    assert gan.kid(flat[0], flat[1])[0] < gan.kid(flat[0], flat[2])[0]
    np.testing.assert_array_equal(fakes, gan.sample(model.generator, 64))


def test_a_killed_training_goes_on_as_if_nothing_had_happened(tmp_path):
    images, films, fakes = blobs(), [], []
    for name, stops in (("whole", [4]), ("killed", [2, 4])):
        for epochs in stops:
            keras.utils.set_random_seed(0)
            model = gan.lab_dcgan(16, 0)  # with its random view and its moving average
            _, film = gan.fit(model, images, epochs=epochs, seed=0, folder=tmp_path / name, batch_size=32, every=2,
                              average=0.9)
        films.append(film)
        fakes.append(gan.sample(model.generator, 8))
    assert films[0].shape == films[1].shape == (2, 16, 16, 16)
    for one, other in (films, fakes):
        np.testing.assert_allclose(one.astype(int), other.astype(int), atol=1)


def test_a_gan_compiled_before_trains_to_the_bit_as_a_new_one(tmp_path):
    def run(seed, name):
        device.start_fresh(seed)
        model = gan.lab_dcgan(16, seed)
        gan.fit(model, blobs(), epochs=2, seed=seed, folder=tmp_path / name, batch_size=32, average=0.9)
        return model

    first = run(0, "a")
    compiled, before = list(device._kept.values()), first.get_weights()
    second = run(1, "b")
    assert list(device._kept.values()) == compiled, "the second did not use the first one's compiled step"
    for now, then in zip(first.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    device._kept.clear()
    for shared, own in zip(second.get_weights(), run(1, "c").get_weights(), strict=True):
        np.testing.assert_array_equal(shared, own)


def test_a_handful_of_images_can_be_held_against_fakes():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(2, 4)), rng.normal(size=(30, 4))
    assert all(map(np.isfinite, gan.density_and_coverage(real, fake)))


def test_trouble_stops_with_a_reason(tmp_path):
    with pytest.raises(ValueError, match="fewer than a batch"):
        gan.fit(lab(), blobs(8), epochs=1, seed=0, folder=tmp_path, batch_size=32)
    with pytest.raises(ValueError, match="at least two images"):
        gan.fit(lab(), blobs(1), epochs=1, seed=0, folder=tmp_path, batch_size=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="file.*cannot be written"):
        gan.fit(lab(), blobs(), epochs=1, seed=0, folder=tmp_path / "file" / "backup", batch_size=32)
    with pytest.raises(ValueError, match="constant"):
        gan.fit(lab(), np.full((64, 16, 16), 7, "uint8"), epochs=1, seed=0, folder=tmp_path, batch_size=32)
    with pytest.raises(RuntimeError, match="not a number"):
        gan.fit(lab(), blobs(), epochs=3, seed=0, folder=tmp_path / "nan", batch_size=32, learning_rate=float("nan"))


def test_measures_know_equal_sets_copies_and_strangers():
    rng = np.random.default_rng(0)
    a, b, far = rng.normal(size=(300, 8)), rng.normal(size=(300, 8)), rng.normal(4, size=(300, 8))
    value, error = gan.kid(a, b)
    assert abs(value) < 4 * error + 0.05 < gan.kid(a, far)[0]
    assert gan.fid(a, b) < 1 < 50 < gan.fid(a, far)
    assert gan.spread(a, b) == pytest.approx(1, abs=0.1) and gan.spread(a, a / 10) == pytest.approx(0.1)
    density, coverage = gan.density_and_coverage(a, b)
    assert density > 0.7 and coverage > 0.8
    assert gan.density_and_coverage(a, far) == (0.0, 0.0)
    assert gan.memorisation(a, b, a[:50] + 1e-3) < 0.1 < 0.8 < gan.memorisation(a, b, rng.normal(size=(300, 8))) < 1.2
