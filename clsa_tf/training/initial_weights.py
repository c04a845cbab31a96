"""Initial weights of a new run from another run or export: `--init_from`."""

import os
import typing

import numpy as np
import tensorflow as tf

from clsa_tf import config as config_lib
from clsa_tf import methods
from clsa_tf.errors import UserError
from clsa_tf.methods.base import RunInfo
from clsa_tf.networks import functional
from clsa_tf.networks.encoder import (
    Encoder,
    copy_variables,
    make_encoder,
    weight_name,
)
from clsa_tf.training import encoder_files, workdir
from clsa_tf.training.checkpoint import restore_method

# Attributes of a method that are never loaded.
_NOT_STATE = ("optimizer", "steps_taken")


class Part(typing.NamedTuple):
    """Whether a part of the method's state was loaded."""

    name: str
    reason: str  # why it was left out; "" if it was loaded

    def __str__(self):
        """Text for the terminal."""
        how = f"left out: {self.reason}" if self.reason else "loaded"
        return f"{self.name}: {how}"


def check(config):
    """Raises `UserError` if `--init_from` is the run's own directory."""
    if config.init_from and _same(config.init_from, config.workdir):
        raise UserError(
            "Expected --init_from of another run, received --workdir itself, "
            f"{config.workdir}; omit --init_from to resume that run, or choose "
            "another --workdir."
        )


def read(config):
    """Reads the initial weights of a run.

    Args:
        config: `clsa_tf.config.Config` of the run, with `init_from`.

    Returns:
        object with the method `give_to(method)`, which loads the weights into
        a new `Method` and returns a list of `Part`. Step and optimizer stay at
        zero.

    Raises:
        UserError: there are no weights, they are damaged, or do not fit.
    """
    path = os.path.expanduser(config.init_from)
    kind = _All if config.init_what == "all" else _Encoder
    return kind(config, path)


class _Encoder:
    """Loads the backbone, and the heads if they fit, from any encoder.

    A momentum encoder becomes a copy of the encoder.
    """

    def __init__(self, config, path):
        model, spec = encoder_files.read(path)
        _check_architecture(config, path, spec)
        self._variables, self._path = model.variables, path
        # An encoder.keras does not record its architecture. Loading it into an
        # encoder of this run shows whether it fits.
        with tf.device("CPU:0"):
            _take_encoder(
                make_encoder(config, name="encoder"), self._variables, path
            )

    def give_to(self, method):
        """See `read`."""
        parts = _take_encoder(method.encoder, self._variables, self._path)
        momentum_encoder = getattr(method, "momentum_encoder", None)
        if momentum_encoder:
            copy_variables(method.encoder, momentum_encoder)
            parts.append(Part("momentum encoder, a copy of the encoder", ""))
        return parts


class _All:
    """Loads everything that fits from a run of the same method."""

    def __init__(self, config, path):
        self._path = path
        given = _config_of(path, config)
        # The shapes of a bank or of prototypes may depend on these numbers.
        run = RunInfo.of(
            given,
            images=workdir.images(path) or 0,
            classes=workdir.classes(path) or 0,
        )
        with tf.device("CPU:0"):
            self._method = methods.class_of(given)(given, run)
            restore_method(self._method, path)
        _check_finite(
            [
                v.numpy()
                for part in _components(self._method).values()
                for v in _variables(part)
                if v.dtype.is_floating
            ],
            path,
        )

    def give_to(self, method):
        """See `read`."""
        mine, given = _components(method), _components(self._method)
        encoders = [n for n in mine if isinstance(mine[n], Encoder)]
        parts = []
        for name in encoders:
            variables = given[name].variables
            found = _take_encoder(mine[name], variables, self._path)
            parts += [Part(f"{name}, {p.name}", p.reason) for p in found]
        other_head = any(part.reason for part in parts)
        for name in [n for n in mine if n not in encoders]:
            # Keys and predictions of another head would be meaningless.
            if other_head:
                parts.append(Part(name, "made for another projection head"))
            else:
                parts.append(_take(name, mine[name], given.get(name)))
        return parts


def _config_of(path, config):
    """Returns the `Config` of the run in `path`, for `--init_what=all`.

    Raises:
        UserError: there is no run, or its method or backbone differs.
    """
    if not os.path.exists(os.path.join(path, config_lib.RUN_FLAGS)):
        raise UserError(
            "Expected the directory of a run with --init_what=all, received "
            f"{path}; omit --init_what to load only the encoder."
        )
    given = config_lib.load(path)
    if given.method != config.method:
        raise UserError(
            f"Expected a run of --method={config.method} with --init_what=all, "
            f"received {path}, a run of {given.method}; omit --init_what to "
            "load only the encoder."
        )
    _check_architecture(config, path, functional.architecture(given))
    return given


def _take_encoder(encoder, variables, path):
    """Loads the backbone, which has to fit, and the heads if they fit.

    Args:
        encoder: `Encoder` to assign to.
        variables: variables of another encoder.
        path: place of the variables, for messages.

    Returns:
        list of `Part`.

    Raises:
        UserError: the backbone does not fit, or a value is not finite.
    """
    given = {weight_name(v): v.numpy() for v in variables}
    _check_finite(given.values(), path)
    problem = _problem(encoder.backbone.variables, given)
    if problem:
        raise UserError(
            f"Expected weights that fit the backbone of this run, received "
            f"those in {path}, {problem}; set --backbone, --width and --stem "
            "to the values that they were trained with."
        )
    _assign(encoder.backbone.variables, given)
    heads = [v for head in encoder.heads for v in head.variables]
    problem = _problem(heads, given)
    if not problem:
        _assign(heads, given)
    return [Part("backbone", ""), Part("projection head", problem)]


def _problem(variables, given):
    """Describes the first variable that does not fit; "" if all fit."""
    for variable in variables:
        name, shape = weight_name(variable), tuple(variable.shape)
        if name not in given:
            return f"which have no {name} {list(shape)}"
        if given[name].shape != shape:
            return (
                f"whose {name} is {list(given[name].shape)} instead of "
                f"{list(shape)}"
            )
    return ""


def _assign(variables, given):
    for variable in variables:
        variable.assign(given[weight_name(variable)])


def _check_architecture(config, path, spec):
    """Raises `UserError` if a recorded architecture differs.

    Its message names the flag, which is clearer than shapes.
    """
    for name in ("backbone", "width", "stem") if spec else ():
        if spec[name] != getattr(config, name):
            raise UserError(
                f"Expected weights for --{name}={getattr(config, name)}, "
                f"received those in {path}, trained with --{name}="
                f"{spec[name]}; pass --{name}={spec[name]} or choose other "
                "weights."
            )


def _check_finite(values, path):
    if not all(np.all(np.isfinite(value)) for value in values):
        raise UserError(
            f"Expected finite weights, received NaN or infinity in {path}; "
            "choose an earlier checkpoint or other weights."
        )


def _components(method):
    """Dict, attribute of a method -> network, queue, variable or list of them.

    Attributes without variables of their own, such as `loss_variables`, are
    left out.
    """
    children = tf.train.TrackableView(method).children(method)
    found, seen = {}, set()
    for name, child in children.items():
        own = {v.ref() for v in _variables(child)} - seen
        if own and name not in _NOT_STATE:
            found[name] = child
            seen |= own
    return found


def _variables(component):
    if isinstance(component, tf.Variable):
        return [component]
    if isinstance(component, (list, tuple)):
        return [v for each in component for v in _variables(each)]
    return list(getattr(component, "variables", ()))


def _take(name, component, other):
    mine, given = _variables(component), _variables(other)
    shapes = [
        " ".join(str(list(v.shape)) for v in variables) or "none"
        for variables in (given, mine)
    ]
    if shapes[0] != shapes[1]:
        return Part(name, f"{shapes[0]} instead of {shapes[1]}")
    for variable, value in zip(mine, given):
        variable.assign(value.numpy())
    return Part(name, "")


def _same(one, other):
    one, other = (os.path.realpath(os.path.expanduser(p)) for p in (one, other))
    return one == other
