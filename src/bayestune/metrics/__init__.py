"""Scores of predictions: probabilities (`scores`), their calibration (`calibration`), numbers (`numbers`), rankings
(`ranking`), draws (`draws`), pairs of methods (`paired`), selection (`selective`), prediction sets (`conformal`) and
intervals (`conformal_numbers`, `bootstrap`).

Functions take tensors and return numbers. They raise DataError, a ValueError, if a row cannot be scored.
"""

from bayestune.metrics.bootstrap import bootstrap_interval as bootstrap_interval
from bayestune.metrics.calibration import EDGE_TOLERANCE as EDGE_TOLERANCE
from bayestune.metrics.calibration import ReliabilityBins as ReliabilityBins
from bayestune.metrics.calibration import confidence_ece as confidence_ece
from bayestune.metrics.calibration import confidence_ece_corrected as confidence_ece_corrected
from bayestune.metrics.calibration import ece as ece
from bayestune.metrics.calibration import ece_corrected as ece_corrected
from bayestune.metrics.calibration import intervals as intervals
from bayestune.metrics.calibration import reliability_bins as reliability_bins
from bayestune.metrics.conformal import SetScores as SetScores
from bayestune.metrics.conformal import conformal_threshold as conformal_threshold
from bayestune.metrics.conformal import prediction_sets as prediction_sets
from bayestune.metrics.conformal import smallest_calibration as smallest_calibration
from bayestune.metrics.conformal import split_conformal as split_conformal
from bayestune.metrics.conformal_numbers import IntervalScores as IntervalScores
from bayestune.metrics.conformal_numbers import conformal_width as conformal_width
from bayestune.metrics.conformal_numbers import split_conformal_intervals as split_conformal_intervals
from bayestune.metrics.draws import Spread as Spread
from bayestune.metrics.draws import spread as spread
from bayestune.metrics.numbers import mixture_cdf as mixture_cdf
from bayestune.metrics.numbers import mixture_crps as mixture_crps
from bayestune.metrics.numbers import mixture_quantiles as mixture_quantiles
from bayestune.metrics.numbers import mixture_row_nll as mixture_row_nll
from bayestune.metrics.paired import PairedDifference as PairedDifference
from bayestune.metrics.paired import paired_interval as paired_interval
from bayestune.metrics.ranking import aupr as aupr
from bayestune.metrics.ranking import auroc as auroc
from bayestune.metrics.ranking import matched_auroc as matched_auroc
from bayestune.metrics.scores import SUM_TOLERANCE as SUM_TOLERANCE
from bayestune.metrics.scores import accuracy as accuracy
from bayestune.metrics.scores import brier as brier
from bayestune.metrics.scores import impossible_labels as impossible_labels
from bayestune.metrics.scores import nll as nll
from bayestune.metrics.scores import row_accuracy as row_accuracy
from bayestune.metrics.scores import row_brier as row_brier
from bayestune.metrics.scores import row_nll as row_nll
from bayestune.metrics.selective import Threshold as Threshold
from bayestune.metrics.selective import aurc as aurc
from bayestune.metrics.selective import binomial_interval as binomial_interval
from bayestune.metrics.selective import risk_coverage as risk_coverage
from bayestune.metrics.selective import threshold_for_error as threshold_for_error
