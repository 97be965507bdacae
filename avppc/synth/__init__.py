"""The talking mouths: a synthetic data set with true audio-visual and temporal structure, in LRW's layout.

espeak-ng speaks and tells when each phoneme begins; visemes move a drawn mouth; a camera and a room spoil both.
"""
