"""`--init_from`: a new run that starts from weights there are."""

import os
import typing

import numpy as np
import tensorflow as tf

from clsa_tf import config as config_lib
from clsa_tf import methods
from clsa_tf.errors import UserError
from clsa_tf.networks import functional
from clsa_tf.networks.encoder import (
    Encoder,
    copy_variables,
    make_encoder,
    weight_name,
)
from clsa_tf.training import encoder_files
from clsa_tf.training.checkpoint import restore_method

# Of a method: what is not part of what it has learned.
_NOT_STATE = ("optimizer", "steps_taken")


class Part(typing.NamedTuple):
    """What became of a part of the method's state."""

    name: str
    reason: str  # why it was left out; empty if it was taken

    def __str__(self):
        """A line for people."""
        how = f"left out: {self.reason}" if self.reason else "taken"
        return f"{self.name}: {how}"


def check(config):
    """Raises `UserError` if a run shall start from itself."""
    if config.init_from and _same(config.init_from, config.workdir):
        raise UserError(
            "Expected --init_from of another run, received --workdir itself, "
            f"{config.workdir}; leave --init_from out to resume that run, or "
            "choose another --workdir."
        )


def read(config):
    """Reads the weights that a run shall start from.

    Args:
        config: `clsa_tf.config.Config` of the run, with `init_from`.

    Returns:
        object with the method `give_to(method)`, which takes the new `Method`
        and returns a list of `Part`. Step and optimizer stay at zero.

    Raises:
        UserError: nothing to load there, it is damaged, or it does not fit.
    """
    path = os.path.expanduser(config.init_from)
    kind = _All if config.init_what == "all" else _Encoder
    return kind(config, path)


class _Encoder:
    """Backbone, and heads if they fit; a momentum encoder becomes a copy."""

    def __init__(self, config, path):
        model, spec = encoder_files.read(path)
        _check_architecture(config, path, spec)
        self._variables, self._path = model.variables, path
        # An encoder.keras does not say what it was trained with.
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
    """Of a run of the same method whatever fits."""

    def __init__(self, config, path):
        self._path = path
        given = _config_of(path, config)
        with tf.device("CPU:0"):
            self._method = methods.load(given.method).METHOD(given)
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
            if other_head:  # neither keys nor predictions would mean anything
                parts.append(Part(name, "made for another projection head"))
            else:
                parts.append(_take(name, mine[name], given.get(name)))
        return parts


def _config_of(path, config):
    """Of a run that all is to be taken from; refuses another method."""
    if not os.path.exists(os.path.join(path, config_lib.RUN_FLAGS)):
        raise UserError(
            "Expected the directory of a run with --init_what=all, received "
            f"{path}; leave --init_what out to take the encoder alone."
        )
    given = config_lib.load(path)
    if given.method != config.method:
        raise UserError(
            f"Expected a run of --method={config.method} with --init_what=all, "
            f"received {path}, a run of {given.method}; leave --init_what out "
            "to take the encoder alone."
        )
    _check_architecture(config, path, functional.architecture(given))
    return given


def _take_encoder(encoder, variables, path):
    """Backbone, which has to fit, and heads."""
    given = {weight_name(v): v.numpy() for v in variables}
    _check_finite(given.values(), path)
    problem = _problem(encoder.backbone.variables, given)
    if problem:
        raise UserError(
            f"Expected weights that fit the backbone of this run, received "
            f"those in {path}, {problem}; set --backbone, --width and --stem "
            "to what they were trained with."
        )
    _assign(encoder.backbone.variables, given)
    heads = [v for head in encoder.heads for v in head.variables]
    problem = _problem(heads, given)
    if not problem:
        _assign(heads, given)
    return [Part("backbone", ""), Part("projection head", problem)]


def _problem(variables, given):
    """The first variable that does not fit what is given, in words."""
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
    """Names flags, where they are known, instead of shapes."""
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
            f"Expected finite weights, received others in {path}; choose an "
            "earlier checkpoint or other weights."
        )


def _components(method):
    """Attribute -> network, queue or list of queues of a method."""
    children = tf.train.TrackableView(method).children(method)
    return {
        name: child
        for name, child in children.items()
        if name not in _NOT_STATE and _variables(child)
    }


def _variables(component):
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
        return Part(name, f"{shapes[0]} there, {shapes[1]} here")
    for variable, value in zip(mine, given):
        variable.assign(value.numpy())
    return Part(name, "")


def _same(one, other):
    one, other = (os.path.realpath(os.path.expanduser(p)) for p in (one, other))
    return one == other
