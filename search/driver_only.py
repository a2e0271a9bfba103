"""What Tune is given and must not keep: it pickles all of it, for a restore that a run never does."""


class DriverOnly:
    """Belongs to this process: what comes out of a pickle of it is empty."""

    def __reduce__(self) -> tuple[type["DriverOnly"], tuple[()]]:
        return DriverOnly, ()
