"""Frozen layers, made lean: what a backbone that does not learn need neither compute nor remember."""

from visadapt.frozen.cached_prefix import CachedPrefix as CachedPrefix
from visadapt.frozen.cached_prefix import cache_prefix as cache_prefix
from visadapt.frozen.lean_model import lean as lean
from visadapt.frozen.lean_model import unlean as unlean
