"""Who signed what: keys, signatures and the enrolment's chain; imported only where signatures are required."""
