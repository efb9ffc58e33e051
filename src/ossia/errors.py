"""What can go wrong for a user, as one tree.

    OssiaError
    ├── InputError                 the request, prompt, schema or flag is not usable      400
    │   ├── ContextLengthError     the request can never fit the context or the memory    400
    │   ├── PreviousResponseError  the response that a request continues is not there     400
    │   ├── UnsupportedError       a parameter of the API that ossia does not have        400
    │   ├── TooLargeError          the request's body is larger than allowed              413
    │   └── ConfigError            a setting (flag, OSSIA_* variable, TOML) is not usable 400
    ├── NotFoundError              a response or file that was named is not there         404
    │   └── ModelNotFoundError     a model that was named is not served                   404
    ├── AuthError                  no key, or one that is not known                       401
    │   └── ForbiddenError         a web page asks that has no business here              403
    ├── LimitError                 too many requests now; later the same one may pass     429
    ├── CheckpointError            a checkpoint's files are damaged or not what they say  500
    ├── TrainingError              a training run cannot go on with these numbers         500
    └── UnavailableError           the network, a device or an extra is not there         503

Every message says what was met, what was expected and what to do. The class carries what the HTTP layer needs, so
that an error is turned into a status in one place and never guessed from its text.
"""

from __future__ import annotations

from typing import ClassVar


class OssiaError(Exception):
    """Base of everything that ossia raises for its users.

    ``status`` is the HTTP status, ``type`` and ``code`` are the fields of OpenAI's error object; ``param`` names the
    offending part of a request where there is one.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InputError(OssiaError):
    """What the caller brought cannot be used; asking again unchanged cannot help."""

    status = 400
    type = "invalid_request_error"


class ContextLengthError(InputError):
    """The prompt, with the tokens asked for, can never fit the context window or the memory given to it."""

    code = "context_length_exceeded"


class PreviousResponseError(InputError):
    """The response that a request continues was not stored, was deleted or has expired."""

    code = "previous_response_not_found"


class UnsupportedError(InputError):
    """The API has this, ossia does not."""

    code = "unsupported_parameter"


class TooLargeError(InputError):
    """The request's body is larger than the server was told to read."""

    status = 413
    code = "request_too_large"


class ConfigError(InputError):
    """A setting has a value that it cannot have."""

    code = "invalid_config"


class NotFoundError(OssiaError):
    """Something named by the caller does not exist."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFoundError(NotFoundError):
    """The model that a request names is not served."""

    code = "model_not_found"


class AuthError(OssiaError):
    """The request carries no key, or one that the server does not know."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class ForbiddenError(AuthError):
    """The request comes by way of a web page from elsewhere, to a server that asks for no key."""

    status = 403
    code = "forbidden"


class LimitError(OssiaError):
    """The server, or this key, has as much to do as it was told to take; ``retry_after_s`` says when to come back."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class CheckpointError(OssiaError):
    """A checkpoint's files are missing, damaged, or of another model."""

    code = "checkpoint_error"


class TrainingError(OssiaError):
    """A training run cannot go on: its loss or its gradients are not finite, or there is nothing to train."""

    code = "training_error"


class UnavailableError(OssiaError):
    """Something outside ossia that the call needs is not there now."""

    status = 503
    code = "unavailable"
