import math

import numpy as np
import pytest
import tensorflow as tf

from clsa_tf import config as config_lib
from clsa_tf.errors import UserError
from clsa_tf.optimizers import adam, optimizers
from clsa_tf.optimizers.schedule import LR_PER, Schedule, make_schedule
from tests import runs


def make(name, rate=0.1, **changes):
    arguments = dict(momentum=0.9, l2=0.01) | changes
    return optimizers.make_optimizer(name, rate, **arguments)


def schedule(peak=0.1, **changes):
    """A schedule whose rate changes in every step."""
    arguments = dict(
        steps_per_epoch=7, total_epochs=9, per="step", warmup_epochs=1.5
    )
    return Schedule(peak, **arguments | changes)


def rates(steps, peak=0.1):
    """The expected rates of `schedule`, in float64."""
    warm, total = 1.5 * 7, 9 * 7
    return [
        peak * step / warm
        if step < warm
        else peak / 2 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
        for step in range(steps)
    ]


def weights_and_gradients(steps, dtype=np.float32):
    """A kernel and a bias, and gradients for both, per step."""
    rng = np.random.default_rng(0)

    def draw():
        return [rng.normal(size=s).astype(dtype) for s in ([5, 3], [3])]

    return draw(), [draw() for _ in range(steps)]


def train(optimizer, start, gradients):
    """Weights after one step for each of `gradients`."""
    weights = [tf.Variable(w) for w in start]
    for step in gradients:
        optimizer.apply_gradients(zip(map(tf.constant, step), weights))
    return [w.numpy() for w in weights]


# ---- Optimizers


def torch_sgd(weight, gradients, rates, *, momentum, l2):
    """torch.optim.SGD as documented."""
    velocity = np.zeros_like(weight)
    for step, (gradient, lr) in enumerate(zip(gradients, rates)):
        gradient = gradient + l2 * weight
        velocity = gradient if step == 0 else momentum * velocity + gradient
        weight = weight - lr * velocity
    return weight


def lars(weight, gradients, rates, *, momentum, l2):
    """LARS with classic momentum and eta 0.001, as published."""
    velocity = np.zeros_like(weight)
    for gradient, lr in zip(gradients, rates):
        trust = 1.0
        if weight.ndim >= 2:
            gradient = gradient + l2 * weight
            norms = np.linalg.norm(weight), np.linalg.norm(gradient)
            trust = 0.001 * norms[0] / norms[1] if all(norms) else 1.0
        velocity = momentum * velocity + lr * trust * gradient
        weight = weight - velocity
    return weight


def adamw(weight, gradients, rates, *, l2):
    """Algorithm 2 of arXiv 1711.05101 with lr as its eta times alpha.

    Epsilon is added before the bias correction, as Keras' Adam does.
    """
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for step, (gradient, lr) in enumerate(zip(gradients, rates), start=1):
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        scale = lr * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        weight = weight - lr * l2 * weight - scale * m / (np.sqrt(v) + 1e-7)
    return weight


@pytest.mark.parametrize("momentum", [0.9, 0.5])
@pytest.mark.parametrize(
    "name, oracle, peak", [("sgd", torch_sgd, 0.1), ("lars", lars, 20.0)]
)
def test_fifty_steps_with_a_changing_rate_equal_the_formula(
    name, oracle, peak, momentum
):
    start, gradients = weights_and_gradients(50, np.float64)
    settings = dict(momentum=momentum, l2=0.01)
    found = train(make(name, schedule(peak), **settings), start, gradients)
    for i, weight in enumerate(start):
        of_weight = [step[i] for step in gradients]
        expected = oracle(weight, of_weight, rates(50, peak), **settings)
        assert np.abs(expected - weight).max() > 0.1
        # The rate is float32.
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-5)


def test_adamw_decays_by_the_rate_of_the_step():
    start, gradients = weights_and_gradients(50, np.float64)
    found = train(make("adamw", schedule(), l2=0.5), start, gradients)
    for i, weight in enumerate(start):
        of_weight = [step[i] for step in gradients]
        expected = adamw(weight, of_weight, rates(50), l2=0.5)
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("l2_on", optimizers.L2_ON)
@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_own_steps_and_checkpoints_equal_those_of_addons(
    name, l2_on, tmp_path, monkeypatch
):
    """Twenty steps; after ten, each continues with the other's state."""
    pytest.importorskip("tensorflow_addons")
    start, gradients = weights_and_gradients(20)
    theirs = Steps(name, l2_on, start)
    monkeypatch.setattr(optimizers, "_addons", lambda: adam)
    ours = Steps(name, l2_on, start)
    assert (
        type(ours.optimizer).__mro__[1].__module__ == "clsa_tf.optimizers.adam"
    )
    assert (
        type(theirs.optimizer).__mro__[1].__module__
        != "clsa_tf.optimizers.adam"
    )
    paths = []
    for steps in (theirs, ours):
        steps.take(gradients[:10])
        paths.append(steps.checkpoint.save(str(tmp_path / str(len(paths)))))
    for steps, path in zip((ours, theirs), paths):
        steps.checkpoint.restore(path).assert_consumed()
        steps.take(gradients[10:])
    for one, two, before in zip(theirs.values(), ours.values(), start * 3):
        np.testing.assert_array_equal(one, two)
        assert np.all(one != before)
    if name == "lamb" and l2_on == "all":
        import tensorflow_addons as tfa

        plain = tfa.optimizers.LAMB(schedule(), weight_decay=0.01)
        expected = train(plain, start, gradients)
        np.testing.assert_equal(ours.values()[:2], expected)


class Steps:
    """Weights with an optimizer that takes steps on them."""

    def __init__(self, name, l2_on, start):
        self.weights = [tf.Variable(w) for w in start]
        self.optimizer = make(name, schedule(), l2_on=l2_on)
        optimizers.build(self.optimizer, self.weights)
        self.checkpoint = tf.train.Checkpoint(
            all=self.weights, optimizer=self.optimizer
        )

    def take(self, gradients):
        for step in gradients:
            self.optimizer.apply_gradients(
                zip(map(tf.constant, step), self.weights)
            )

    def values(self):
        """Weights, first and second moments."""
        slots = [
            self.optimizer.get_slot(weight, name)
            for name in "mv"
            for weight in self.weights
        ]
        return [v.numpy() for v in [*self.weights, *slots]]


def test_l2_is_coupled():
    weight = tf.Variable(1.0)
    sgd = make("sgd")
    for _ in range(50):
        sgd.apply_gradients([(tf.constant(0.0), weight)])
    # torch: 0.6439; a decoupled decay leaves 0.9512.
    assert float(weight) == pytest.approx(0.6439, abs=5e-5)


@pytest.mark.parametrize(
    "name, l2_on, kernel, bias",
    [
        ("sgd", "all", 1 - 0.1 * 0.01, 1 - 0.1 * 0.01),
        ("sgd", "kernels", 1 - 0.1 * 0.01, 1),
        # The trust ratio, eta / l2, cancels the coefficient.
        ("lars", "all", 1 - 0.1 * 0.001, 1),
        ("lars", "kernels", 1 - 0.1 * 0.001, 1),
        ("lamb", "all", 1 - 0.1, 1 - 0.1),
        ("lamb", "kernels", 1 - 0.1, 1),
        ("adamw", "all", 1 - 0.1 * 0.01, 1 - 0.1 * 0.01),
        ("adamw", "kernels", 1 - 0.1 * 0.01, 1),
    ],
)
def test_l2_acts_on_the_chosen_weights(name, l2_on, kernel, bias):
    """Compares the share of weights left by a step without gradients."""
    start, _ = weights_and_gradients(0, np.float64)
    still = [[np.zeros_like(w) for w in start]]
    found = train(make(name, l2_on=l2_on), start, still)
    for weight, before, share in zip(found, start, (kernel, bias)):
        np.testing.assert_allclose(weight / before, share, rtol=1e-6)


@pytest.mark.parametrize("start, gradient", [(0.0, 1.0), (2.0, 0.0)])
def test_lars_without_a_norm_is_sgd(start, gradient):
    weight = tf.fill([2, 2], tf.constant(start, tf.float64))
    gradients = [[np.full([2, 2], gradient)]]
    found = train(make("lars", l2=0.0), [weight], gradients)
    np.testing.assert_allclose(found[0], start - 0.1 * gradient)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_steps_resume_from_a_checkpoint(name, tmp_path):
    start, gradients = weights_and_gradients(4)

    def begin():
        weights = [tf.Variable(w) for w in start]
        optimizer = make(name, schedule())
        optimizers.build(optimizer, weights)
        return (
            weights,
            optimizer,
            tf.train.Checkpoint(all=weights, optimizer=optimizer),
        )

    def take_steps(weights, optimizer, gradients):
        for step in gradients:
            optimizer.apply_gradients(zip(map(tf.constant, step), weights))

    weights, optimizer, checkpoint = begin()
    take_steps(weights, optimizer, gradients[:2])
    path = checkpoint.save(str(tmp_path / name))
    take_steps(weights, optimizer, gradients[2:])
    again, optimizer, checkpoint = begin()
    checkpoint.restore(path).assert_consumed()
    take_steps(again, optimizer, gradients[2:])
    for one, two, before in zip(weights, again, start):
        np.testing.assert_array_equal(one, two)
        assert np.all(one.numpy() != before)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_steps_are_the_same_under_xla(name):
    start, gradients = weights_and_gradients(3)
    weights = [tf.Variable(w) for w in start]
    optimizer = make(name, schedule(), l2_on="kernels")
    optimizers.build(optimizer, weights)

    @tf.function(jit_compile=True)
    def step(gradients):
        optimizer.apply_gradients(zip(gradients, weights))

    for one in gradients:
        step(list(map(tf.constant, one)))
    expected = train(make(name, schedule(), l2_on="kernels"), start, gradients)
    for weight, other in zip(weights, expected):
        np.testing.assert_allclose(weight, other, rtol=1e-5)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_loss_scaling_skips_steps_that_are_not_finite(name):
    start, (one, two) = weights_and_gradients(2)
    lost = [np.full_like(w, np.inf) for w in start]
    optimizer = make(name, precision="mixed_float16")
    found = train(optimizer, start, [one, lost])
    np.testing.assert_equal(found, train(make(name), start, [one]))
    # The slots stay finite, too.
    optimizer = make(name, precision="mixed_float16")
    assert np.all(np.isfinite(train(optimizer, start, [one, lost, two])[0]))


def replicated(name, replicas, start, gradients):
    """Steps on several replicas; each has its share of the gradients."""
    devices = [f"CPU:{i}" for i in range(replicas)]
    strategy = tf.distribute.MirroredStrategy(devices)
    with strategy.scope():
        weights = [tf.Variable(w) for w in start]
        optimizer = make(name, schedule(), l2_on="kernels")
        optimizers.build(optimizer, weights)

    @tf.function
    def step(gradients):
        def of_replica():
            shares = [g / replicas for g in gradients]
            optimizer.apply_gradients(zip(shares, weights))

        strategy.run(of_replica)

    for one in gradients:
        step(list(map(tf.constant, one)))
    copies = [strategy.experimental_local_results(w) for w in weights]
    return [[v.numpy() for v in copy] for copy in copies]


def on_two_replicas(start, gradients):
    cpu = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    return {
        name: replicated(name, 2, start, gradients)
        for name in optimizers.OPTIMIZERS
    }


def test_two_replicas_take_the_same_steps_as_one():
    """In another process, as the number of devices is fixed at the start."""
    start, gradients = weights_and_gradients(4)
    found = runs.in_new_process(on_two_replicas, start, gradients)
    for name, copies in found.items():
        optimizer = make(name, schedule(), l2_on="kernels")
        for copy, expected in zip(copies, train(optimizer, start, gradients)):
            assert len(copy) == 2
            for weight in copy:
                np.testing.assert_allclose(weight, expected, rtol=1e-5)


# ---- Schedules


def of_config(steps_per_epoch, **changes):
    config = config_lib.default(**changes)
    config_lib.check(config)
    return make_schedule(config, steps_per_epoch)


def test_the_default_is_the_published_cosine():
    rate = of_config(5004)
    golden = {
        0: 0.03,
        50: 0.02560660171779821,
        100: 0.015,
        150: 0.004393398282201788,
        199: 1.8505127750911841e-6,
    }
    for epoch, value in golden.items():
        # The whole epoch has one rate.
        for step in (epoch * 5004, epoch * 5004 + 5003):
            # 1 + cos loses digits near zero in float32.
            assert float(rate(step)) == pytest.approx(value, abs=2e-9)


def test_the_rate_warms_up_and_then_follows_a_cosine_per_step():
    """As in SimCLR: 10 of 100 epochs rise to 0.3 * 4096 / 256."""
    rate = of_config(
        312,
        batch_size=4096,
        base_lr=0.3,
        total_epochs=100,
        warmup_epochs=10.0,
        lr_per="step",
    )
    golden = {
        0: 0.0,
        1: 4.8 / 3120,
        1560: 2.4,
        3119: 4.8 * 3119 / 3120,
        3120: 4.8,
        3120 + 7020: 4.8 * (1 + math.sqrt(0.5)) / 2,
        3120 + 14040: 2.4,
        31199: 2.4 * (1 + math.cos(math.pi * 28079 / 28080)),
    }
    for step, value in golden.items():
        assert float(rate(step)) == pytest.approx(value, rel=1e-5, abs=5e-7)


def test_warm_up_may_end_within_an_epoch():
    rate = of_config(10, total_epochs=3, warmup_epochs=0.5)
    expected = [0.03 * step / 5 for step in range(5)] + [0.03] * 5
    for whole in (0.5, 1.5):
        value = 0.015 * (1 + math.cos(math.pi * whole / 2.5))
        expected += [value] * 10
    found = [float(rate(step)) for step in range(30)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("per", LR_PER)
def test_the_rate_drops_at_milestones(per):
    """The schedule of MoCo v1."""
    rate = of_config(
        5004, lr_schedule="steps", lr_milestones=(120, 160), lr_per=per
    )
    golden = {
        0: 0.03,
        120 * 5004 - 1: 0.03,
        120 * 5004: 0.003,
        160 * 5004 - 1: 0.003,
        160 * 5004: 0.0003,
        200 * 5004 - 1: 0.0003,
    }
    for step, value in golden.items():
        assert float(rate(step)) == pytest.approx(value, rel=1e-6)


def test_the_rate_is_constant_after_warm_up():
    rate = of_config(4, lr_schedule="constant", warmup_epochs=1.0)
    found = [float(rate(step)) for step in (0, 2, 4, 5, 799)]
    np.testing.assert_allclose(found, [0.0, 0.015, 0.03, 0.03, 0.03])


@pytest.mark.parametrize(
    "scaling, base_lr, peak",
    [("linear", 0.3, 4.8), ("sqrt", 0.075, 4.8), ("none", 0.5, 0.5)],
)
def test_the_rate_scales_with_the_batch(scaling, base_lr, peak):
    rate = of_config(312, batch_size=4096, base_lr=base_lr, lr_scaling=scaling)
    assert float(rate(0)) == pytest.approx(peak, rel=1e-6)


def test_schedules_are_restored_from_their_configuration():
    one = of_config(7, lr_schedule="steps", lr_milestones=(3,))
    two = Schedule.from_config(one.get_config())
    steps = (0, 20, 21, 22)
    assert [float(one(s)) for s in steps] == [float(two(s)) for s in steps]


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            dict(warmup_epochs=200.0),
            ["--warmup_epochs", "received 200", "--total_epochs=200"],
        ),
        (dict(lr_milestones=(120, 160)), ["120,160", "cosine"]),
        (dict(lr_schedule="steps"), ["--lr_milestones", "none", "steps"]),
        *[
            (
                dict(lr_schedule="steps", lr_milestones=milestones, **more),
                ["--lr_milestones", ",".join(map(str, milestones))],
            )
            for milestones, more in [
                ((160, 120), {}),
                ((120, 120), {}),
                ((120, 200), {}),
                ((0, 120), {}),
                ((5, 120), dict(warmup_epochs=10.0)),
            ]
        ],
    ],
)
def test_impossible_schedules_are_rejected(changes, words):
    with pytest.raises(UserError) as error:
        config_lib.check(config_lib.default(**changes))
    for word in words:
        assert word in str(error.value)


def parse(*arguments):
    return config_lib.parse(arguments)


@pytest.mark.parametrize("text, value", [("120,160", (120, 160)), ("9", (9,))])
def test_milestones_are_a_flag(text, value):
    config = parse("--lr_schedule=steps", f"--lr_milestones={text}")
    assert config.lr_milestones == value
    again = config_lib.to_flagfile(config).splitlines()
    assert f"--lr_milestones={text}" in again
    assert parse(*again) == config


def test_no_milestones_are_an_empty_flag():
    config = parse("--lr_milestones=")
    assert config == config_lib.default()
    assert parse(*config_lib.to_flagfile(config).splitlines()) == config


@pytest.mark.parametrize("text", ["120,", "120;160", "1.5"])
def test_milestones_that_are_not_numbers_are_rejected(text):
    with pytest.raises(UserError) as error:
        parse("--lr_schedule=steps", f"--lr_milestones={text}")
    for word in ("--lr_milestones", repr(text)):
        assert word in str(error.value)
