"""The errors that a user may see. Each says what is wrong, where, and how to mend it."""


class PipelineError(Exception):
    """A mistake or a fault that is reported by its message alone, never by a traceback."""

    status = 1
    """Exit status of the command that it ends."""


class ConfigError(PipelineError):
    """params.yaml or an environment variable holds something that cannot be used."""


class DataError(PipelineError):
    """Raw data or a store is missing, damaged or unusable."""


class TaskError(PipelineError):
    """The episodes asked for cannot be drawn from this store."""


class TrainingError(PipelineError):
    """Training cannot go on: non-finite numbers, a dead worker, a changed world."""


class GuardError(TrainingError):
    """Numbers that no worker may go on with; every worker raises it, at the same step."""


class StorageError(TrainingError):
    """A disk, or an object store, refuses what has to be kept."""

    status = 74  # EX_IOERR of sysexits.h


class StoppedError(TrainingError):
    """The run was asked to stop, and did so behind a checkpoint."""

    status = 143  # as of a process that SIGTERM ended


class ArtefactError(PipelineError):
    """A saved folder is incomplete, altered, or not of the expected kind."""


class RegistryError(PipelineError):
    """The model registry refused, is unreachable, or does not hold what was asked for."""


class MachineError(PipelineError):
    """This machine lacks something that the command needs."""
