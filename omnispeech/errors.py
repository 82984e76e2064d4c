"""Every error the project raises on purpose.

* OmniSpeechError
  - ConfigError          a setting is wrong: nothing was started
  - CheckpointError      files are missing, damaged, or do not fit the model
  - RequestError         the caller asked for something we cannot do       (HTTP 400)
    - AudioError         the caller sent audio we cannot use               (HTTP 400)
    - TooLarge           the request body is over the limit                (HTTP 413)
    - RequestTimeout     the request body takes too long to arrive         (HTTP 408)
    - PromptTooLong      the conversation is longer than the context       (HTTP 400)
    - Unauthorized       no API key, or one that is not known              (HTTP 401)
    - Forbidden          a web page of another origin asks                 (HTTP 403)
    - Unsupported        this model cannot do it                           (HTTP 501)
  - Unavailable          not now, but later                                (HTTP 503)
    - TooManyRequests    the limits of the API key are used up             (HTTP 429)
    - NotReady           the models are still being loaded                 (HTTP 503)
    - Overloaded         no conversation is free and the queue is full     (HTTP 503)
    - Stopped            the server ended in the middle of the reply       (HTTP 503)
  - GenerationError      the device failed in the middle of a reply        (HTTP 500)
"""


class OmniSpeechError(Exception):
    """Says what is wrong, the value, what is allowed and what to do."""

    status = 500


class ConfigError(OmniSpeechError):
    pass


class CheckpointError(OmniSpeechError):
    pass


class RequestError(OmniSpeechError):
    status = 400


class AudioError(RequestError):
    pass


class TooLarge(RequestError):
    status = 413


class RequestTimeout(RequestError):
    status = 408


class PromptTooLong(RequestError):
    def __init__(self, message: str, positions: int = 0, room: int = 0) -> None:
        """positions: what the prompt takes; room: what there is for it.

        Each error of this tree can be made from its message alone: that is how it is copied.
        """
        super().__init__(message)
        self.positions = positions
        self.room = room


class Unauthorized(RequestError):
    status = 401


class Forbidden(RequestError):
    status = 403


class Unsupported(RequestError):
    status = 501


class Unavailable(OmniSpeechError):
    status = 503
    retry_after_s = 1


class TooManyRequests(Unavailable):
    status = 429

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(Unavailable):
    retry_after_s = 5


class Overloaded(Unavailable):
    pass


class Stopped(Unavailable):
    retry_after_s = 5


class GenerationError(OmniSpeechError):
    pass
