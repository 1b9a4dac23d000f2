from dino.evaluation.features import evaluation_mode, extract_features, normalized
from dino.evaluation.inputs import EvaluationInputs, Evaluator
from dino.evaluation.knn import KNNResult, knn_classify, nearest_neighbours
from dino.evaluation.knn_evaluator import KNNEvaluator
from dino.evaluation.label_free import LabelFreeEvaluator, effective_rank
from dino.evaluation.pictures import PicturesEvaluator
from dino.evaluation.validation_loss import ValidationLossEvaluator

__all__ = [
    "EvaluationInputs",
    "Evaluator",
    "KNNEvaluator",
    "KNNResult",
    "LabelFreeEvaluator",
    "PicturesEvaluator",
    "ValidationLossEvaluator",
    "effective_rank",
    "evaluation_mode",
    "extract_features",
    "knn_classify",
    "nearest_neighbours",
    "normalized",
]
