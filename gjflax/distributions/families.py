"""The distributions by name. TFP is not loaded before one of them needs it.

>>> import jax, gjflax
>>> _, trace = gjflax.Normal.simulate(jax.random.key(0), (0.0, 2.0))
>>> trace.get_retval().shape
()
"""

from __future__ import annotations

from gjflax.distributions.tfp import TFPDistribution

Normal = TFPDistribution("Normal")
LogNormal = TFPDistribution("LogNormal")
HalfNormal = TFPDistribution("HalfNormal")
TruncatedNormal = TFPDistribution("TruncatedNormal")
StudentT = TFPDistribution("StudentT")
Cauchy = TFPDistribution("Cauchy")
HalfCauchy = TFPDistribution("HalfCauchy")
Laplace = TFPDistribution("Laplace")
Logistic = TFPDistribution("Logistic")
Gumbel = TFPDistribution("Gumbel")
Uniform = TFPDistribution("Uniform")
Exponential = TFPDistribution("Exponential")
Gamma = TFPDistribution("Gamma")
InverseGamma = TFPDistribution("InverseGamma")
Chi2 = TFPDistribution("Chi2")
Beta = TFPDistribution("Beta")
Kumaraswamy = TFPDistribution("Kumaraswamy")
Weibull = TFPDistribution("Weibull")
Pareto = TFPDistribution("Pareto")
VonMises = TFPDistribution("VonMises")
Dirichlet = TFPDistribution("Dirichlet")
MultivariateNormalDiag = TFPDistribution("MultivariateNormalDiag")
MultivariateNormalTriL = TFPDistribution("MultivariateNormalTriL")
MultivariateNormalFullCovariance = TFPDistribution("MultivariateNormalFullCovariance")
Wishart = TFPDistribution("Wishart")
CholeskyLKJ = TFPDistribution("CholeskyLKJ")
Bernoulli = TFPDistribution("Bernoulli")
Binomial = TFPDistribution("Binomial")
Categorical = TFPDistribution("Categorical")
OneHotCategorical = TFPDistribution("OneHotCategorical")
Multinomial = TFPDistribution("Multinomial")
Poisson = TFPDistribution("Poisson")
NegativeBinomial = TFPDistribution("NegativeBinomial")
Geometric = TFPDistribution("Geometric")
MixtureSameFamily = TFPDistribution("MixtureSameFamily")
TransformedDistribution = TFPDistribution("TransformedDistribution")
Independent = TFPDistribution("Independent")
GaussianProcess = TFPDistribution("GaussianProcess")
HiddenMarkovModel = TFPDistribution("HiddenMarkovModel")
LinearGaussianStateSpaceModel = TFPDistribution("LinearGaussianStateSpaceModel")
Deterministic = TFPDistribution("Deterministic")

NAMES = tuple(name for name, value in list(globals().items()) if isinstance(value, TFPDistribution))
"""The names of the families above."""

TFP_ALIASES = {f"TFP{name}": globals()[name] for name in NAMES}
"""The same by the names of older notebooks: ``TFPUniform`` is ``Uniform``."""
globals().update(TFP_ALIASES)
