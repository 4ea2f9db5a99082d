"""Every exception and warning that jaxmp raises on purpose.

Each class stands for one mistake, and each kind of mistake has a base class, so that
one `except` catches either. A message says what is wrong, shows the value, and says
what to write instead.
"""


class JaxmpError(Exception):
    """Base class of every error in this module."""


# Installation


class InstallationError(JaxmpError, ImportError):
    """Something that jaxmp needs is not installed, or is too old."""


class UnsupportedJaxVersion(InstallationError):
    """The installed JAX is older than the oldest that jaxmp runs on."""


class MissingPackage(InstallationError):
    """An optional package that a function needs is not installed."""


# Policies and rules


class PolicyError(JaxmpError, ValueError):
    """A policy, or a rule that belongs to it, cannot be read or does not fit."""


class InvalidRule(PolicyError):
    """A rule cannot be read."""


class UnusedRule(PolicyError):
    """A rule matches no layer of the module it is applied to."""


# Flax modules


class ModuleError(JaxmpError):
    """A policy cannot be applied to a Flax module, or would have no effect on it."""


class InvalidOption(ModuleError, ValueError):
    """An option of `apply_policy` has an unknown value."""


class NotAModule(ModuleError, TypeError):
    """The argument is not an instance of a Flax module."""


class MissingExample(ModuleError, TypeError):
    """A linen module can only be described with arguments to call it with."""


class PolicyWithoutEffect(ModuleError, ValueError):
    """A half-precision policy leaves every matmul of a model in float32."""


# Autocast


class AutocastError(JaxmpError, TypeError):
    """A function, argument or rule that autocast cannot take."""


class AutocastRuleError(AutocastError, ValueError):
    """A rule of autocast cannot be read, or matches nothing."""


class RuleAlreadyRegistered(AutocastError, ValueError):
    """A primitive was given a second rule."""


class NoSuchRows(AutocastError, ValueError):
    """An explanation has no rows of the kind that was asked for."""


class NoSecondDerivative(AutocastError):
    """A float8 or int8 matmul was differentiated twice."""


# Loss scales


class LossScaleError(JaxmpError):
    """A loss scale was set up wrongly, is missing, or has collapsed."""


class LossScaleOptionError(LossScaleError, ValueError):
    """An option of a loss scale is out of range or does not exist."""


class TrainStateOptionError(LossScaleError, TypeError):
    """A train state was given a keyword that it has no use for."""


class MissingLossScale(LossScaleError, ValueError):
    """A state that should hold a loss scale holds none."""


class MissingLossScaleArgument(LossScaleError, TypeError):
    """A gradient function was called without `loss_scale=`."""


class MultipleLossScales(LossScaleError, ValueError):
    """One optimizer state holds more than one loss scale."""


class LossScalePolicyMismatch(LossScaleError, ValueError):
    """An optimizer has the loss scale of another policy than it is trained under."""


class LossScaleCollapsed(LossScaleError, RuntimeError):
    """So many steps in a row were skipped that training has stopped."""


class SelectPredicateError(LossScaleError, AssertionError):
    """The predicate of `select_tree` is not a boolean scalar."""


# Gradients


class GradientError(JaxmpError):
    """Gradients cannot be computed from this loss, or do not fit the parameters."""


class NonScalarLoss(GradientError, TypeError):
    """The loss is an array with axes, or not an array at all."""


class NonFloatingLoss(GradientError, TypeError):
    """The loss is an integer or a boolean, which has no gradient."""


class MissingAux(GradientError, TypeError):
    """`has_aux=True`, but the function does not return `(loss, aux)`."""


class TransformError(GradientError, TypeError):
    """`transform=` cannot differentiate this function."""


class GradientTreeMismatch(GradientError, ValueError):
    """Gradients and parameters are trees of different structure."""


class MicroBatchError(GradientError, ValueError):
    """A batch cannot be cut into the micro-batches that were asked for."""


class DataAxesError(GradientError, ValueError):
    """The axes of a mesh that a batch is divided over cannot be found or used."""


class DataAxesOptionError(GradientError, ValueError):
    """An option of `data_axes` has an unknown value, or nothing to apply to."""


class CollectiveInLoss(GradientError, ValueError):
    """A loss function reduces over an axis that `data_axes` divides its batch over."""


# Optimizers


class OptimizerError(JaxmpError):
    """An optimizer of jaxmp was set up, updated or restored wrongly."""


class OptimizerOptionError(OptimizerError, ValueError):
    """An option of an optimizer wrapper is out of range or does not exist."""


class TransformationOrder(OptimizerError, ValueError):
    """Two transformations stand in an order in which they cannot work."""


class MissingParams(OptimizerError, ValueError):
    """`update` was called without the parameters."""


class MissingState(OptimizerError, ValueError):
    """An optimizer state does not hold the state that is looked for in it."""


class MasterWeightsMismatch(OptimizerError, ValueError):
    """Working weights and their float32 masters do not belong together."""


class DtypeMismatch(OptimizerError, ValueError):
    """Arrays are stored in other dtypes than they should be."""


# Many devices


class ShardingError(JaxmpError):
    """Arrays, axes or processes do not fit the devices that they run on."""


class UnknownAxis(ShardingError, NameError):
    """An axis is named that nothing has bound, or that the mesh does not have."""


class ShardingOptionError(ShardingError, ValueError):
    """An option of `jaxmp.sharding` is missing, or has no meaning on this mesh."""


class ReduceDtypeError(ShardingError, ValueError):
    """Gradients cannot be summed over devices in this dtype."""


class GradientsAlreadySummed(ShardingError, ValueError):
    """Gradients are to be reduced over an axis along which JAX has summed them."""


class PartitionMismatch(ShardingError, ValueError):
    """Partition specs or shardings do not fit the arrays that they are for."""


class ProcessPolicyMismatch(ShardingError, ValueError):
    """Two processes of one run have different policies."""


# Checkpoints


class CheckpointError(JaxmpError):
    """A checkpoint cannot be restored into this state."""


class CheckpointPolicyMismatch(CheckpointError, ValueError):
    """A checkpoint was written under another policy than it is read under."""


class InvalidCheckpoint(CheckpointError, ValueError):
    """A checkpoint holds no train state of jaxmp, or nothing at all."""


class CheckpointMeshMismatch(CheckpointError, ValueError):
    """An array of a checkpoint cannot be divided over the mesh it is restored on."""


# Values


class NumericsError(JaxmpError, ValueError):
    """An argument of `jaxmp.numerics` that has no meaning there."""


class SearchStateMismatch(NumericsError):
    """A saved search belongs to another function, policy or batch, or is not one."""


class NotOnHost(NumericsError, TypeError):
    """A function that reads values on the host was called inside a trace."""


# Programs


class ReportError(JaxmpError):
    """A program cannot be traced, compiled or checked as asked."""


class UnknownTarget(ReportError, ValueError):
    """There is no compile target of that name."""


class MissingTargetPackage(ReportError, InstallationError):
    """The compiler for a target is not installed, or its environment is not set."""


class NotAnArray(ReportError, TypeError):
    """A step is to be traced with an argument that is not an array."""


class StepDoesNotTrace(ReportError, TypeError):
    """A step raises while JAX traces or lowers it."""


class ShardingMismatch(ReportError, ValueError):
    """A step is divided over another number of devices than its target has."""


class InvalidStep(ReportError, ValueError):
    """The name given on the command line is not a function that makes a step."""


class BatchSearchError(ReportError, ValueError):
    """A search for the largest batch has no batch to try, or no memory to fill."""


class CompilerFailed(ReportError, RuntimeError):
    """The compiler of a target failed, or ended without an answer."""


class InvalidAssertion(ReportError, ValueError):
    """An assertion of `jaxmp.testing` was asked for something it cannot check."""


# Warnings


class MostlyFloat32Warning(UserWarning):
    """Layers with most of a model's parameters stay in float32 under a half policy."""


class NothingQuantizedWarning(UserWarning):
    """A policy that quantises matmuls leaves all of a function in half."""


class NoBlocksWarning(UserWarning):
    """A rule for the first and the last blocks of a model finds no blocks."""


class HalfParamsWarning(UserWarning):
    """Half-precision parameters meet an optimizer that keeps no float32 copy."""


class UnscaledGradientsWarning(UserWarning):
    """Gradients meet a float16 optimizer whose loss scale they were not made with."""


class Fp8MetadataWarning(UserWarning):
    """Scales of float8 layers meet an optimizer that trains them like parameters."""


class HalfReferenceWarning(UserWarning):
    """The function that policies are compared with multiplies in half by itself."""
