"""The only error table: each error's name and what it becomes at every edge.

Raise a `QuireError` (or one of its start-up subclasses) anywhere; HTTP, gRPC and the
command line translate it once, by the table. Knows no protocol library: gRPC status
codes stand by name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """What an error of one name becomes: HTTP status, OpenAI type and code, gRPC status name,
    whether a client should try again, and the exit status of a command that ends by it."""

    status: int
    type: str
    code: str | None
    grpc: str
    retry: bool
    exit_status: int = 1


KINDS: dict[str, Kind] = {
    # the request is wrong: the same request will fail again
    "invalid_request": Kind(400, "invalid_request_error", None, "INVALID_ARGUMENT", False),
    "invalid_json": Kind(400, "invalid_request_error", "invalid_json", "INVALID_ARGUMENT", False),
    "context_length_exceeded": Kind(
        400, "invalid_request_error", "context_length_exceeded", "INVALID_ARGUMENT", False
    ),
    "unsupported": Kind(400, "invalid_request_error", "unsupported", "UNIMPLEMENTED", False),
    "invalid_api_key": Kind(
        401, "authentication_error", "invalid_api_key", "UNAUTHENTICATED", False
    ),
    "model_not_found": Kind(404, "invalid_request_error", "model_not_found", "NOT_FOUND", False),
    "not_found": Kind(404, "invalid_request_error", "not_found", "NOT_FOUND", False),
    "method_not_allowed": Kind(
        405, "invalid_request_error", "method_not_allowed", "UNIMPLEMENTED", False
    ),
    "request_timeout": Kind(
        408, "invalid_request_error", "request_timeout", "DEADLINE_EXCEEDED", True
    ),
    "payload_too_large": Kind(
        413, "invalid_request_error", "payload_too_large", "RESOURCE_EXHAUSTED", False
    ),
    "unsupported_media_type": Kind(
        415, "invalid_request_error", "unsupported_media_type", "INVALID_ARGUMENT", False
    ),
    # the server can't take it now
    "queue_full": Kind(429, "rate_limit_error", "queue_full", "RESOURCE_EXHAUSTED", True),
    "not_ready": Kind(503, "unavailable_error", "not_ready", "UNAVAILABLE", True),
    "draining": Kind(503, "unavailable_error", "draining", "UNAVAILABLE", True),
    "scheduler_unavailable": Kind(
        503, "unavailable_error", "scheduler_unavailable", "UNAVAILABLE", True
    ),
    "worker_lost": Kind(503, "server_error", "worker_lost", "UNAVAILABLE", True),
    "deadline_exceeded": Kind(
        504, "timeout_error", "deadline_exceeded", "DEADLINE_EXCEEDED", False
    ),
    # the server failed at it
    "request_crashed_worker": Kind(
        500, "server_error", "request_crashed_worker", "INTERNAL", False
    ),
    "numeric_error": Kind(500, "server_error", "numeric_error", "INTERNAL", False),
    "internal_error": Kind(500, "server_error", "internal_error", "INTERNAL", False),
    "cancelled": Kind(499, "cancelled_error", "cancelled", "CANCELLED", False),
    # a command can't start
    "config_error": Kind(
        500, "server_error", "config_error", "FAILED_PRECONDITION", False, exit_status=2
    ),
    "model_error": Kind(
        500, "server_error", "model_error", "FAILED_PRECONDITION", False, exit_status=2
    ),
    "resource_error": Kind(
        500, "server_error", "resource_error", "RESOURCE_EXHAUSTED", False, exit_status=2
    ),
    "address_in_use": Kind(
        500, "server_error", "address_in_use", "FAILED_PRECONDITION", False, exit_status=98
    ),
}


class QuireError(Exception):
    """An error with a name in `KINDS`. The message says what was wrong, which value, what to do."""

    def __init__(
        self,
        name: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.name = name
        self.kind = KINDS[name]
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def to_openai(self) -> dict[str, dict[str, str | None]]:
        """The body every OpenAI client understands."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind.type,
                "param": self.param,
                "code": self.kind.code,
            }
        }


class InvalidRequest(QuireError):
    """A request that can't be served as it is; `param` names the field."""

    def __init__(self, message: str, param: str | None = None, name: str = "invalid_request"):
        super().__init__(name, message, param=param)


class StartupError(QuireError):
    """A command can't start. Prints as 'Label: message' and exits with the kind's status."""

    label = "Error"

    def __str__(self) -> str:
        return f"{self.label}: {self.message}"


class ConfigError(StartupError):
    """A flag, variable or key that can't be used."""

    label = "Configuration error"

    def __init__(self, message: str):
        super().__init__("config_error", message)


class ModelError(StartupError):
    """Model files that are missing, damaged or of no known architecture."""

    label = "Model error"

    def __init__(self, message: str):
        super().__init__("model_error", message)


class ResourceError(StartupError):
    """Not enough memory, or no such device."""

    label = "Resource error"

    def __init__(self, message: str):
        super().__init__("resource_error", message)


class AddressInUse(StartupError):
    """Somebody listens there already."""

    label = "Address already in use"

    def __init__(self, message: str):
        super().__init__("address_in_use", message)
