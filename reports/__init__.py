"""From loaded runs to pandas tables, plotly figures and one HTML page."""
