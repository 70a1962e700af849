"""Draw from posteriors, predict and generate with them, and score the results."""

from bayestune.inference.acquire import acquire as acquire
from bayestune.inference.answer_scores import AnswerScores as AnswerScores
from bayestune.inference.answer_scores import answer_scores as answer_scores
from bayestune.inference.best_of_n import best_of_n as best_of_n
from bayestune.inference.best_of_n import rewards as rewards
from bayestune.inference.diagnostics import Diagnostics as Diagnostics
from bayestune.inference.diagnostics import diagnostics as diagnostics
from bayestune.inference.draws import draw as draw
from bayestune.inference.evaluate import evaluate as evaluate
from bayestune.inference.generate import generate as generate
from bayestune.inference.generation import Generation as Generation
from bayestune.inference.generation import clusters as clusters
from bayestune.inference.novelty import features as features
from bayestune.inference.novelty import novelty as novelty
from bayestune.inference.predict import predict as predict
from bayestune.inference.prompt_information import prompt_information as prompt_information
from bayestune.inference.score import score as score
from bayestune.inference.shading import shaded as shaded
from bayestune.inference.shading import shaded_html as shaded_html
from bayestune.tasks import Prediction as Prediction
from bayestune.tasks import Scores as Scores
