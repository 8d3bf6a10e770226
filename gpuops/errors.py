"""One small tree of errors, by what the caller would do next.

    GpuopsError                anything gpuops raises on purpose
      InputError               what was given is wrong: mend the argument, the file or the config
        QualityError           the data breaks a declared rule: mend the data or the rule
      UnavailableError         something needed is not here: install it, start it or say where it is
      IntegrityError           bytes or identities differ from what was recorded: do not use them

Each message says what to do next. `exit_code` is what the command line returns.
"""


class GpuopsError(Exception):
    """Anything gpuops raises on purpose; the command line prints it as one line."""

    exit_code = 1


class InputError(GpuopsError, ValueError):
    """What was given is wrong; mend the argument, the file or the config."""

    exit_code = 2


class QualityError(InputError):
    """The data breaks a declared rule; the message names variable, index and value."""

    exit_code = 3


class UnavailableError(GpuopsError, RuntimeError):
    """Something needed is not here: an extra, a server, a device."""

    exit_code = 4


class IntegrityError(GpuopsError, RuntimeError):
    """Bytes or identities differ from what was recorded; do not use them."""

    exit_code = 5
