"""What can go wrong in pruning itself; wrong arguments are plain `ValueError` and `TypeError`."""


class PruningError(Exception):
    """Base of the family. Every message ends with the way out."""


class TraceError(PruningError):
    """The model cannot be read: its forward fails on the example inputs."""


class ScoreError(PruningError):
    """A criterion or the weights it reads gave something that is no finite number."""


class SurgeryError(PruningError):
    """A cut could not be made; the model is what it was before."""


class HistoryError(PruningError):
    """A checkpoint's pruning history is missing, foreign or does not fit the model."""


class LatencyTableError(PruningError):
    """A file of timings cannot be read, or comes from another machine."""


class NothingToPruneError(PruningError, ValueError):
    """No group can be pruned, or none that the criterion can score."""


class ExportError(PruningError):
    """A network cannot be written in a format, or the file does not do what the network does."""


class ReportError(PruningError):
    """There is nothing to report on, or something that the report needs is not installed."""
