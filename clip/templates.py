"""Prompt templates: OpenAI's 80 templates for ImageNet, and the five scene templates that TagCLIP adds."""
from clip.tokenizer import open_clip_file

IMAGENET_TEMPLATES = tuple(
    template("{}") for template in open_clip_file("zero_shot_metadata").OPENAI_IMAGENET_TEMPLATES
)
SCENE_TEMPLATES = (
    "there is a {} in the scene.",
    "there is the {} in the scene.",
    "this is a {} in the scene.",
    "this is the {} in the scene.",
    "this is one {} in the scene.",
)
