"""The errors that a user may see. Each says what is wrong, where, and how to mend it."""


class PipelineError(Exception):
    """A mistake or a fault that is reported by its message alone, never by a traceback."""


class ConfigError(PipelineError):
    """params.yaml or an environment variable holds something that cannot be used."""


class DataError(PipelineError):
    """Raw data or a store is missing, damaged or unusable."""


class TaskError(PipelineError):
    """The episodes asked for cannot be drawn from this store."""


class TrainingError(PipelineError):
    """Training cannot go on: non-finite numbers, a dead worker, a changed world."""


class ArtefactError(PipelineError):
    """A saved folder is incomplete, altered, or not of the expected kind."""


class RegistryError(PipelineError):
    """The model registry refused, is unreachable, or does not hold what was asked for."""


class MachineError(PipelineError):
    """This machine lacks something that the command needs."""
