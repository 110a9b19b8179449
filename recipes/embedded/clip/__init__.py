"""mini, mini-declip: trained and shipped."""
