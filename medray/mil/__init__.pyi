from .config import holds_slide_model as holds_slide_model
from .embed_slides import embed as embed
from .evaluate import evaluate_slides as evaluate_slides
from .infer import infer_slides as infer_slides
from .rehearsal import dry_train_slides as dry_train_slides
from .train import train_slides as train_slides
