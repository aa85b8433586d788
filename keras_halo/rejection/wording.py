"""Numbers as the rules word them."""


def percent(fraction):
    """Returns a fraction as text.

    Args:
        fraction: Float.

    Returns:
        String.

    Example:

    >>> percent(0.951234)
    '95.12 %'
    >>> percent(0.9999999)
    '99.99999 %'
    """
    text = f"{100.0 * fraction:.4g}"
    if text == "100" and fraction < 1.0:
        # Nearly certain is not certain.
        text = f"{100.0 * fraction:.15g}"
    return f"{text} %"


def share(part, whole):
    """Returns a part of a whole as text.

    Args:
        part: Integer.
        whole: Integer.

    Returns:
        String.

    Example:

    >>> share(30, 40), share(0, 0)
    ('30 of 40 (75 %)', '0 of 0')
    """
    if not whole:
        return f"{part} of {whole}"
    return f"{part} of {whole} ({percent(part / whole)})"


def thresholds_in_words(threshold):
    """Returns a threshold, or one for each class or group, as text.

    Args:
        threshold: Float, or a list of floats.

    Returns:
        String.

    Example:

    >>> thresholds_in_words(0.5), thresholds_in_words([0.5, 2.0])
    ('0.5', '0.5, 2')
    """
    if isinstance(threshold, list):
        return ", ".join(map(thresholds_in_words, threshold))
    return f"{threshold:.7g}"
