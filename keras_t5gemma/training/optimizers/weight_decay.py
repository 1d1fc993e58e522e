"""Which weights an optimizer does not decay, as a part of its config."""


class SavesExclusions:
    """A mix-in before a Keras optimizer: names that are excluded from weight decay are saved and copied with it.

    Keras's config leaves them out, so that a loaded or copied model would decay what the saved one does not.

    Args:
        *args: of the Keras optimizer.
        no_decay: a weight with one of these in its name is not decayed; as `exclude_from_weight_decay(var_names=...)`.
        **kwargs: likewise.
    """

    no_decay = None

    def __init__(self, *args, no_decay=None, **kwargs):
        super().__init__(*args, **kwargs)
        if no_decay:
            self.exclude_from_weight_decay(var_names=no_decay)

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """As in Keras. What `var_list` names is not saved, as in Keras."""
        super().exclude_from_weight_decay(var_list, var_names)
        self.no_decay = tuple(var_names) if var_names else None

    def get_config(self):
        """The constructor's arguments."""
        return {**super().get_config(), **({"no_decay": list(self.no_decay)} if self.no_decay else {})}
