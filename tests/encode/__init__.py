"""Tests of the image and text encoders."""
