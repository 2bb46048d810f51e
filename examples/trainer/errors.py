"""One error for all that a user of the trainer can put right."""


class TrainerError(ValueError):
    """The data, the model or a setting does not fit; the message says what to do."""
