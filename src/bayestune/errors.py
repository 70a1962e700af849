"""Exceptions a user can cause. Each carries one line: what was found, what was expected, where, what to do."""


class BayestuneError(Exception):
    """Base class of every error this library raises on purpose."""


class ConfigError(BayestuneError, ValueError):
    """A setting, flag or combination of settings that cannot be right."""


class DataError(BayestuneError, ValueError):
    """A file, row or field of the data that cannot be used as it is."""


class MissingSplitError(DataError):
    """A split that a data set does not have."""


class TaskError(BayestuneError, ValueError):
    """A task that does not fit the model or the tokenizer."""


class PosteriorError(BayestuneError, ValueError):
    """A posterior that is incomplete, altered, made for another base model, or not finite."""


class DrawError(BayestuneError, RuntimeError):
    """Draws were requested that a model or posterior does not have."""


class TrainingError(BayestuneError, RuntimeError):
    """Training cannot be resumed or continued."""


class ServingError(BayestuneError, RuntimeError):
    """A server of draws that is unreachable, or does not answer as its record says."""


class DiskError(BayestuneError, OSError):
    """A file that could not be written."""


class BayestuneWarning(UserWarning):
    """A result that needs attention."""


def one_line(error: Exception) -> str:
    """Return the first 300 characters of an error, on one line."""
    return " ".join(str(error).split())[:300]
