"""Prompt learners: what is trained are the vectors around class names, through a frozen tower."""

from transclip_fast.heads.prompts.context import ContextSettings
from transclip_fast.heads.prompts.learning import Learner, Prompting, Schedule
from transclip_fast.heads.prompts.tower import TextTower

__all__ = ["ContextSettings", "Learner", "Prompting", "Schedule", "TextTower"]
