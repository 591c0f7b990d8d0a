r"""The Kullback-Leibler divergence of a guide's choice from the model's, in closed form where TFP knows one:

KL(q || p) = E_q[log q(z) − log p(z)].
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gjflax.distributions.arguments import free_promotion
from gjflax.distributions.tfp import TFPDistribution, _tfd
from gjflax.learning.estimators.estimator import without_estimator
from gjflax.learning.estimators.relaxed import RelaxedEstimator
from gjflax.learning.sites import Site


def is_known(guide: Site, model: Site) -> bool:
    """Whether the divergence of two sites is known in closed form. It looks at types and shapes alone."""
    for site in (guide, model):
        relaxed = isinstance(site.distribution, RelaxedEstimator)
        if relaxed or not isinstance(without_estimator(site.distribution), TFPDistribution):
            return False
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (guide.leaf.args, model.leaf.args))
    try:
        jax.eval_shape(_over_plates(guide, model), *shapes)
    except NotImplementedError:
        return False
    return True


def divergence(guide: Site, model: Site) -> Any:
    """KL(q || p) of a choice, of the shape of its plates."""
    return _over_plates(guide, model)(guide.leaf.args, model.leaf.args)


def _over_plates(guide: Site, model: Site) -> Any:
    def one(guide_args: Any, model_args: Any) -> Any:
        q, p = _built(guide, guide_args), _built(model, model_args)
        with free_promotion():
            return jnp.sum(_tfd().kl_divergence(q, p))

    for _ in guide.plates:
        one = jax.vmap(one)
    return one


def _built(site: Site, args: Any) -> Any:
    """A site's distribution as one of TFP."""
    distribution = without_estimator(site.distribution)
    values = dataclasses.replace(site.leaf, args=args).get_args()
    return distribution._of_tfp(distribution._class(), values)._distribution
