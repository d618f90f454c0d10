"""The errors a user can cause. Vocabulary; each message holds the offending value."""


class UnsupportedModelError(ValueError):
    """The model's config asks for something that is not implemented; the message names the key."""


class ModelNotFoundError(ValueError):
    """The model is neither a path nor in the cache, and cannot be downloaded."""


class CheckpointError(ValueError):
    """The weight files are damaged or do not fit the model's config."""


class InvalidRequestError(ValueError):
    """A prompt or a sampling parameter is out of range. `parameter` names it, `value` is it."""

    def __init__(self, message: str, parameter: str | None = None, value: object = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.value = value


class EngineDeadError(RuntimeError):
    """The engine has failed or was shut down; it serves no more requests."""


class ChatTemplateError(InvalidRequestError):
    """The chat template is missing or faulty, raises for these messages, or exceeds a limit."""
