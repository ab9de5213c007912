"""Tests of vramplan."""
