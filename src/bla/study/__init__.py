"""The human study: people choose between explanations, blind; what they chose is analysed as registered."""
