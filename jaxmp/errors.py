"""Every exception and warning that jaxmp raises on purpose.

Each class stands for one mistake, so that it can be caught by name. Each message
says what was wrong, shows the value, and says what to write instead.
"""


class JaxmpError(Exception):
    """Base class of every error in this module."""


class UnsupportedJaxVersion(JaxmpError, ImportError):
    """The installed JAX is older than the oldest that jaxmp runs on."""


# Policies


class PolicyError(JaxmpError, ValueError):
    """A policy was written in a way that cannot be read."""


# Rules and modules


class InvalidRule(JaxmpError, ValueError):
    """A rule cannot be read."""


class UnusedRule(JaxmpError, ValueError):
    """A rule matches no layer of the module it is applied to."""


class InvalidOption(JaxmpError, ValueError):
    """An option of `apply_policy` has a value that means nothing."""


class MissingExample(JaxmpError, TypeError):
    """A linen module was to be looked at without arguments to call it with."""


class PolicyWithoutEffect(JaxmpError, ValueError):
    """A half-precision policy leaves every matmul of a model in float32."""


class NotAModule(JaxmpError, TypeError):
    """Something else than an instance of a Flax module was given as one."""


# Loss scales


class LossScaleOptionError(JaxmpError, ValueError):
    """An option of a loss scale is out of its range or does not exist."""


class MissingLossScale(JaxmpError, ValueError):
    """A state was given for its loss scale, and it holds none."""


class LossScalePolicyMismatch(JaxmpError, ValueError):
    """An optimizer has the loss scale of another policy than it is trained under."""


class MissingLossScaleArgument(JaxmpError, TypeError):
    """A gradient function was called without `loss_scale=`."""


class MultipleLossScales(JaxmpError, ValueError):
    """One optimizer state holds more than one loss scale."""


class LossScaleCollapsed(JaxmpError, RuntimeError):
    """So many steps in a row were skipped that training has stopped."""


class NotOnHost(JaxmpError, TypeError):
    """A function that reads values on the host was called inside a trace."""


class SelectPredicateError(JaxmpError, AssertionError):
    """The predicate of `select_tree` is no boolean scalar."""


# Losses and gradients


class NonScalarLoss(JaxmpError, TypeError):
    """The loss is an array with axes, or no array at all."""


class NonFloatingLoss(JaxmpError, TypeError):
    """The loss is an integer or a boolean, which has no gradient."""


class MissingAux(JaxmpError, TypeError):
    """`has_aux=True`, but the function does not return `(loss, aux)`."""


class TransformError(JaxmpError, TypeError):
    """`transform=` is none that can differentiate this function."""


class GradientTreeMismatch(JaxmpError, ValueError):
    """Gradients and parameters are trees of different structure."""


class MicroBatchError(JaxmpError, ValueError):
    """A batch cannot be cut into the micro-batches that were asked for."""


# Optimizers


class TransformationOrder(JaxmpError, ValueError):
    """Two transformations stand in an order in which they cannot work."""


class OptimizerOptionError(JaxmpError, ValueError):
    """An option of an optimizer wrapper is out of its range or does not exist."""


class MissingParams(JaxmpError, ValueError):
    """`update` was called without the parameters."""


class MissingState(JaxmpError, ValueError):
    """An optimizer state holds no state of the transformation that is asked for."""


class MasterWeightsMismatch(JaxmpError, ValueError):
    """Working weights and their float32 masters do not belong together."""


class DtypeMismatch(JaxmpError, ValueError):
    """Arrays are stored in other dtypes than they should be."""


# Train states


class TrainStateOptionError(JaxmpError, TypeError):
    """A train state was given a keyword that it has no use for."""


# Checkpoints


class CheckpointPolicyMismatch(JaxmpError, ValueError):
    """A checkpoint was written under another policy than it is read under."""


class InvalidCheckpoint(JaxmpError, ValueError):
    """A checkpoint holds no train state of jaxmp, or none at all."""


# Autocast


class AutocastError(JaxmpError, TypeError):
    """A function or argument that autocast cannot take."""


class AutocastRuleError(JaxmpError, ValueError):
    """A rule of autocast that cannot be read, or that matches nothing."""


class RuleAlreadyRegistered(JaxmpError, ValueError):
    """A primitive was given a second rule."""


class NoSuchRows(JaxmpError, ValueError):
    """Rows of an explanation were asked for by a name that is none of a kind of row."""


# Compile targets


class UnknownTarget(JaxmpError, ValueError):
    """There is no compile target of that name."""


class MissingTargetPackage(JaxmpError, ImportError):
    """The compiler for a target is not installed, or its environment is not set."""


class NotAnArray(JaxmpError, TypeError):
    """A step is to be looked at with an argument that is no array."""


class StepDoesNotTrace(JaxmpError, TypeError):
    """A step raises while JAX traces or lowers it."""


class ShardingMismatch(JaxmpError, ValueError):
    """A step is divided over another number of devices than its target has."""


class InvalidStep(JaxmpError, ValueError):
    """What the command line names is no function that makes a step."""


class BatchSearchError(JaxmpError, ValueError):
    """A search for the largest batch has no batch to try, or no memory to fill."""


class MissingPackage(JaxmpError, ImportError):
    """An optional package that a function needs is not installed."""


class CompilerFailed(JaxmpError, RuntimeError):
    """The compiler of a target failed, or ended without an answer."""


# Assertions


class InvalidAssertion(JaxmpError, ValueError):
    """An assertion of `jaxmp.testing` was asked for what it cannot check."""


# Numerics


class NumericsError(JaxmpError, ValueError):
    """An argument of `jaxmp.numerics` that has no meaning there."""


class SearchStateMismatch(JaxmpError, ValueError):
    """A saved search belongs to another function, policy or batch, or is none."""


# Warnings


class MostlyFloat32Warning(UserWarning):
    """Layers with most of a model's parameters stay in float32 under a half policy."""


class HalfParamsWarning(UserWarning):
    """Half-precision parameters meet an optimizer that keeps no float32 copy."""


class UnscaledGradientsWarning(UserWarning):
    """Gradients meet a float16 optimizer whose loss scale they were not made with."""
