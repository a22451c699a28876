"""Prompt learners: the vectors around class names are trained through a frozen text tower."""

from transclip_fast.heads.prompts.settings import ContextSettings, Prompting, Schedule
from transclip_fast.heads.prompts.tower import TextTower

__all__ = ["ContextSettings", "Prompting", "Schedule", "TextTower"]
