"""Scaling to the trust region."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngd_optim.step.trust_region import trust_region_scale

positive = st.floats(1e-12, 1e12)
reproducible = settings(deadline=None, derandomize=True, database=None)


@reproducible
@given(quadratic=positive, max_kl=positive)
def test_scale(quadratic, max_kl):
    boundary = trust_region_scale(quadratic, max_kl, "boundary")
    assert 0.5 * boundary**2 * quadratic == pytest.approx(max_kl, rel=1e-12)
    clip = trust_region_scale(quadratic, max_kl, "clip")
    assert clip == (1.0 if 0.5 * quadratic <= max_kl else boundary)
    assert trust_region_scale(quadratic, max_kl, "damped") == boundary


@pytest.mark.parametrize("kind", ["clip", "boundary", "damped"])
@pytest.mark.parametrize(
    ("quadratic", "max_kl"), [(5.0, None), (0.0, 0.1), (-1.0, 0.1), (1e9, None)]
)
def test_scale_without_a_region_or_without_curvature(kind, quadratic, max_kl):
    assert trust_region_scale(quadratic, max_kl, kind) == 1.0
