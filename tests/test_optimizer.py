import numpy as np
import pytest
import tensorflow as tf

from clsa_tf import optimizer


def torch_sgd(weight, gradients, rates, *, momentum, l2):
    """torch.optim.SGD as its documentation states it."""
    velocity = np.zeros_like(weight)
    for step, (gradient, lr) in enumerate(zip(gradients, rates)):
        gradient = gradient + l2 * weight
        velocity = gradient if step == 0 else momentum * velocity + gradient
        weight = weight - lr * velocity
    return weight


def test_fifty_steps_equal_torch_with_a_changing_rate():
    rng = np.random.default_rng(0)
    start = rng.normal(size=[5, 3])
    gradients = rng.normal(size=[50, 5, 3])
    schedule = optimizer.CosineByEpoch(0.1, steps_per_epoch=7, total_epochs=9)
    weight = tf.Variable(start)
    sgd = optimizer.make_optimizer("sgd", schedule, momentum=0.9, l2=0.01)
    for gradient in gradients:
        sgd.apply_gradients([(tf.constant(gradient), weight)])
    rates = [0.05 * (1 + np.cos(np.pi * (s // 7) / 9)) for s in range(50)]
    expected = torch_sgd(start, gradients, rates, momentum=0.9, l2=0.01)
    # The rate is float32.
    np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)


def test_l2_is_coupled():
    weight = tf.Variable(1.0)
    sgd = optimizer.make_optimizer("sgd", 0.1, momentum=0.9, l2=0.01)
    for _ in range(50):
        sgd.apply_gradients([(tf.constant(0.0), weight)])
    # torch: 0.6439; a decoupled decay leaves 0.9512.
    assert float(weight) == pytest.approx(0.6439, abs=5e-5)


def test_cosine_by_epoch_golden():
    schedule = optimizer.CosineByEpoch(
        0.03, steps_per_epoch=5004, total_epochs=200
    )
    golden = {
        0: 0.03,
        50: 0.02560660171779821,
        100: 0.015,
        150: 0.004393398282201788,
        199: 1.8505127750911841e-6,
    }
    for epoch, rate in golden.items():
        # The whole epoch has one rate.
        for step in (epoch * 5004, epoch * 5004 + 5003):
            # 1 + cos loses digits near zero in float32.
            assert float(schedule(step)) == pytest.approx(rate, abs=2e-9)


def test_lamb_takes_steps_and_restores(tmp_path):
    def make():
        weight = tf.Variable([1.0, -2.0])
        lamb = optimizer.make_optimizer("lamb", 0.1, momentum=0.9, l2=0.01)
        optimizer.build(lamb, [weight])
        return weight, lamb, tf.train.Checkpoint(weight=weight, optimizer=lamb)

    def steps(weight, lamb, count):
        for _ in range(count):
            lamb.apply_gradients([(2.0 * weight, weight)])

    weight, lamb, checkpoint = make()
    steps(weight, lamb, 2)
    path = checkpoint.save(str(tmp_path / "lamb"))
    steps(weight, lamb, 2)
    assert abs(float(weight[0])) < 1.0
    again, lamb, checkpoint = make()
    checkpoint.restore(path).assert_consumed()
    steps(again, lamb, 2)
    np.testing.assert_array_equal(again, weight)
