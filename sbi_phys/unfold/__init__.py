"""Unfolding: the spectrum before the detector from the measured one, with its full covariance.

response            the response matrix with efficiency, fakes, background and its own noise; `pairs` fills it from a store
measurement         a measured spectrum with its response, by name or from a CSV file
ibu                 iterative Bayesian unfolding, with a rule that chooses the number of iterations
tikhonov            regularised least squares
folding             forward folding: fit of a parametric flux
bayes, spectrum     fully Bayesian unfolding with a smoothness prior; the same model as a simulator
omnifold_weights    OmniFold: weights for simulated events
flow                unfolding event by event with an invertible network
forward             p(reco | truth) learned, then the truth fitted: the simulated spectrum does not enter
replicas            bootstrap errors of the learned methods
validation, checks  closure, stress, coverage, bottom line, dependence on the prior, ranks of event posteriors

The binned methods take and give histograms of hist and boost-histogram too (`histograms`).
"""

from sbi_phys.core.lazy import public_names
from sbi_phys.unfold.ibu import ibu as ibu  # bound here: Python would bind the module of that name otherwise
from sbi_phys.unfold.tikhonov import tikhonov as tikhonov

__getattr__, __dir__, __all__ = public_names(__name__, __file__)
