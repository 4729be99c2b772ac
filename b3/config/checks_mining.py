"""Whether the keys of a recipe that decide over classification data fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from b3.config import Config


def check_classification(config: Config) -> None:
    """Raise `ValueError` with one line where `mining.target_unit` or `classification_subset` has no effect."""
    mining = config.mining
    labelled = [entry for entry in config.data.datasets if entry.family == "classification"]
    for key, given in (
        ("target_unit label30", mining.target_unit == "label30"),
        (f"classification_subset {mining.classification_subset}", mining.classification_subset is not None),
    ):
        if given and not labelled:
            raise ValueError(f"mining.{key} has no effect: no data set has family classification")
    if mining.classification_subset is not None and mining.k > mining.classification_subset:
        raise ValueError(
            f"mining.classification_subset {mining.classification_subset} is smaller than the community size {mining.k}"
        )
    if mining.target_unit == "label30":
        for entry in labelled:
            if mining.p_of(entry) and (entry.p is not None or not isinstance(mining.p, int)):
                raise ValueError(
                    f"p {mining.p_of(entry)} of {entry.subset} has no effect with mining.target_unit label30; set it"
                    " to 0 or leave it out"
                )
