"""Pictures: line charts as SVG, and pages that hold them and open without a network."""
