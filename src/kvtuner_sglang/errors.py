"""The errors a user meets: one sentence that says what to change."""


class UserError(Exception):
    """Bad input or an environment that does not fit; the message is one sentence that says what to change."""


class ConfigError(UserError):
    """The composed configuration is wrong or impossible; raised before anything is written or started."""


class RunFailed(UserError):
    """A run that started could not be finished; the message names the rank, node or request that broke it."""


class MeasurementInvalid(UserError):
    """Samples were taken but may not count; the message names the rule of `measure/validity.py` they broke."""
