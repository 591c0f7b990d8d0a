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

NAMES = (
    "Normal",
    "LogNormal",
    "HalfNormal",
    "TruncatedNormal",
    "StudentT",
    "Cauchy",
    "HalfCauchy",
    "Laplace",
    "Logistic",
    "Gumbel",
    "Uniform",
    "Exponential",
    "Gamma",
    "InverseGamma",
    "Chi2",
    "Beta",
    "Kumaraswamy",
    "Weibull",
    "Pareto",
    "VonMises",
    "Dirichlet",
    "MultivariateNormalDiag",
    "MultivariateNormalTriL",
    "MultivariateNormalFullCovariance",
    "Wishart",
    "CholeskyLKJ",
    "Bernoulli",
    "Binomial",
    "Categorical",
    "OneHotCategorical",
    "Multinomial",
    "Poisson",
    "NegativeBinomial",
    "Geometric",
    "MixtureSameFamily",
    "TransformedDistribution",
    "Independent",
    "GaussianProcess",
    "HiddenMarkovModel",
    "LinearGaussianStateSpaceModel",
    "Deterministic",
)
"""The names of the families above."""

# The same by the names of older notebooks.
TFPNormal = Normal
TFPLogNormal = LogNormal
TFPHalfNormal = HalfNormal
TFPTruncatedNormal = TruncatedNormal
TFPStudentT = StudentT
TFPCauchy = Cauchy
TFPHalfCauchy = HalfCauchy
TFPLaplace = Laplace
TFPLogistic = Logistic
TFPGumbel = Gumbel
TFPUniform = Uniform
TFPExponential = Exponential
TFPGamma = Gamma
TFPInverseGamma = InverseGamma
TFPChi2 = Chi2
TFPBeta = Beta
TFPKumaraswamy = Kumaraswamy
TFPWeibull = Weibull
TFPPareto = Pareto
TFPVonMises = VonMises
TFPDirichlet = Dirichlet
TFPMultivariateNormalDiag = MultivariateNormalDiag
TFPMultivariateNormalTriL = MultivariateNormalTriL
TFPMultivariateNormalFullCovariance = MultivariateNormalFullCovariance
TFPWishart = Wishart
TFPCholeskyLKJ = CholeskyLKJ
TFPBernoulli = Bernoulli
TFPBinomial = Binomial
TFPCategorical = Categorical
TFPOneHotCategorical = OneHotCategorical
TFPMultinomial = Multinomial
TFPPoisson = Poisson
TFPNegativeBinomial = NegativeBinomial
TFPGeometric = Geometric
TFPMixtureSameFamily = MixtureSameFamily
TFPTransformedDistribution = TransformedDistribution
TFPIndependent = Independent
TFPGaussianProcess = GaussianProcess
TFPHiddenMarkovModel = HiddenMarkovModel
TFPLinearGaussianStateSpaceModel = LinearGaussianStateSpaceModel
TFPDeterministic = Deterministic

TFP_ALIASES = tuple(f"TFP{name}" for name in NAMES)
"""The names of the aliases."""

__all__ = [*NAMES, *TFP_ALIASES]  # pyright: ignore[reportUnsupportedDunderAll]
