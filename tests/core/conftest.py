"""Hypothesis profiles: `--hypothesis-profile no-shrink` where only pass or fail counts."""

from __future__ import annotations

from hypothesis import Phase, settings

settings.register_profile("no-shrink", phases=(Phase.explicit, Phase.generate))
