"""Every error the project raises on purpose.

* OmniSpeechError
  - ConfigError          a setting is wrong: nothing was started
  - CheckpointError      files are missing, damaged, or do not fit the model
  - RequestError         the caller asked for something we cannot do       (HTTP 400)
    - AudioError         the caller sent audio we cannot use               (HTTP 400)
    - TooLarge           the request body is over the limit                (HTTP 413)
  - Unavailable          not now, but later                                (HTTP 503)
    - NotReady           the models are still being loaded                 (HTTP 503)
    - Overloaded         no conversation is free and the queue is full     (HTTP 503)
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


class Unavailable(OmniSpeechError):
    status = 503
    retry_after_s = 1


class NotReady(Unavailable):
    retry_after_s = 5


class Overloaded(Unavailable):
    pass


class GenerationError(OmniSpeechError):
    pass
