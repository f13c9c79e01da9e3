"""Networks: summary networks, conditional flows over nflows transforms. The only folder that imports nflows."""
