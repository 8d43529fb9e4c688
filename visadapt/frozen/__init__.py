"""Lean frozen layers: a backbone that is not trained can compute less and keep less for the backward pass."""

from visadapt.frozen.cached_prefix import CachedPrefix as CachedPrefix
from visadapt.frozen.cached_prefix import cache_prefix as cache_prefix
from visadapt.frozen.lean_model import lean as lean
from visadapt.frozen.lean_model import unlean as unlean
