"""Saves the weights that an optimizer does not decay in its config."""

from collections.abc import Sequence


class SavesExclusions:
    """A mix-in before a Keras optimizer: saves and copies the names that are excluded from weight decay.

    Keras's config leaves them out, so that a loaded or copied model would decay weights that the saved one does not.

    Args:
        *args: arguments of the Keras optimizer.
        no_decay: a weight with one of these strings in its name is not decayed, as by
            `exclude_from_weight_decay(var_names=...)`.
        **kwargs: arguments of the Keras optimizer.
    """

    no_decay = None

    def __init__(self, *args, no_decay: Sequence[str] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if no_decay:
            self.exclude_from_weight_decay(var_names=no_decay)

    def exclude_from_weight_decay(self, var_list: list | None = None, var_names: Sequence[str] | None = None) -> None:
        """Excludes variables from weight decay, by identity or by parts of their names.

        Args:
            var_list: variables; as in Keras, they are not saved.
            var_names: parts of names, which are saved.
        """
        super().exclude_from_weight_decay(var_list, var_names)
        self.no_decay = tuple(var_names) if var_names else None

    def get_config(self) -> dict:
        """The constructor's arguments."""
        return {**super().get_config(), **({"no_decay": list(self.no_decay)} if self.no_decay else {})}
