"""All families by name, for processes that are told the name only."""

from benchmarks import auxiliary, contrastive, linear, margin
from benchmarks.variants import Family

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in (margin, auxiliary, linear, contrastive)}
