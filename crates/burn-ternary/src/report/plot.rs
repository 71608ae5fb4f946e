//! Pictures of a run as SVG: the loss curve and the codes of every layer.

use super::{file::write_atomic, step_report::StepReport};
use plotters::{
    coord::{
        Shift,
        types::{RangedCoordf64, RangedCoordusize},
    },
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};
use std::{error::Error, io, ops::Range, path::Path};

/// Share of zeros that absmean makes of Gaussian weights: `P(|w| <= mean |w| / 2) = erf(1 / (2 sqrt(pi)))`.
const GAUSSIAN_ZEROS: f64 = 0.310_04;

// Colours that colour-blind people can tell apart (Okabe and Ito, <https://jfly.uni-koeln.de/color/>).
const BLUE: RGBColor = RGBColor(0, 114, 178);
const SKY: RGBColor = RGBColor(86, 180, 233);
const VERMILLION: RGBColor = RGBColor(213, 94, 0);
const ORANGE: RGBColor = RGBColor(230, 159, 0);
const INK: RGBColor = RGBColor(40, 44, 52);
const SILVER: RGBColor = RGBColor(200, 204, 210);
const GRID: RGBColor = RGBColor(228, 231, 235);

/// The codes, each with its color.
const CODES: [(RGBColor, &str); 3] = [(BLUE, "-1"), (SILVER, "0"), (ORANGE, "+1")];

type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;
type LossChart<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<RangedCoordusize, RangedCoordf64>>;

/// Draws the loss over the steps, 900 x 540: every training report, their moving average, and the validation losses.
/// Reports whose loss is not finite are left out.
///
/// # Errors
/// What the file system says, with the path.
pub fn loss_curve(path: &Path, train: &[StepReport], valid: &[StepReport], title: &str) -> io::Result<()> {
    let (train, valid) = (points(train), points(valid));
    svg(path, (900, 540), |canvas| draw_loss(canvas, &train, &valid, title))
}

/// Draws the validation losses of several runs in one chart, 900 x 480, to compare them. `runs`: label and validation reports, at most
/// three. Reports whose loss is not finite are left out.
///
/// # Errors
/// The file system's error, with the path.
pub fn compared_losses(path: &Path, runs: &[(String, Vec<StepReport>)], title: &str) -> io::Result<()> {
    let runs: Vec<_> = runs.iter().map(|(label, valid)| (label.as_str(), points(valid))).collect();
    svg(path, (900, 480), |canvas| draw_comparison(canvas, &runs, title))
}

/// Draws, for every layer, the shares of its codes -1, 0 and +1 as one bar. Between the two dashed lines would be the 31.0 % zeros of
/// Gaussian weights. `layers`: name and how many codes are -1, 0 and +1.
///
/// # Errors
/// What the file system says, with the path.
pub fn code_histogram(path: &Path, layers: &[(String, [u64; 3])]) -> io::Result<()> {
    let height = 144 + 26 * layers.len().max(1) as u32;
    svg(path, (900, height), |canvas| draw_codes(canvas, layers))
}

fn draw_loss(canvas: &Canvas, train: &[(usize, f64)], valid: &[(usize, f64)], title: &str) -> Drawn {
    let mut chart = loss_chart(canvas, train.iter().chain(valid), title)?;
    let line = |color: RGBColor, width| color.stroke_width(width);
    let key = |style: ShapeStyle| move |(x, y)| PathElement::new(vec![(x, y), (x + 24, y)], style);
    if !train.is_empty() {
        chart
            .draw_series(LineSeries::new(train.iter().copied(), line(SKY, 1)))?
            .label("training")
            .legend(key(line(SKY, 1)));
        chart
            .draw_series(LineSeries::new(moving_average(train), line(BLUE, 3)))?
            .label("training, moving average")
            .legend(key(line(BLUE, 3)));
    }
    draw_validation(&mut chart, valid, "validation", VERMILLION)?;
    draw_legend(&mut chart)
}

fn draw_comparison(canvas: &Canvas, runs: &[(&str, Vec<(usize, f64)>)], title: &str) -> Drawn {
    let mut chart = loss_chart(canvas, runs.iter().flat_map(|(_, valid)| valid), title)?;
    for ((label, valid), color) in runs.iter().zip([BLUE, VERMILLION, ORANGE]) {
        draw_validation(&mut chart, valid, label, color)?;
    }
    draw_legend(&mut chart)
}

/// Axes and grid for losses over steps, wide enough for `points`.
fn loss_chart<'a, 'p>(
    canvas: &Canvas<'a>,
    points: impl Iterator<Item = &'p (usize, f64)> + Clone,
    title: &str,
) -> Result<LossChart<'a>, Box<dyn Error>> {
    let losses = loss_range(points.clone().map(|(_, loss)| *loss));
    let last_step = points.map(|(step, _)| *step).max().unwrap_or(0).max(1);
    let decimals = (1.0 - (losses.end - losses.start).log10().floor()).clamp(0.0, 6.0) as usize;
    let mut chart = ChartBuilder::on(canvas)
        .caption(title, text(22))
        .margin(14)
        .margin_right(28)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .build_cartesian_2d(0..last_step, losses)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(SILVER)
        .x_labels(9)
        .y_labels(8)
        .y_label_formatter(&|loss| format!("{loss:.decimals$}"))
        .x_desc("optimizer step")
        .y_desc("loss, nats per token")
        .label_style(text(15))
        .axis_desc_style(text(16))
        .draw()?;
    Ok(chart)
}

/// Validation losses as a line with a dot per validation; the legend has the last one.
fn draw_validation(chart: &mut LossChart, valid: &[(usize, f64)], label: &str, color: RGBColor) -> Drawn {
    let Some((_, last)) = valid.last() else { return Ok(()) };
    chart
        .draw_series(LineSeries::new(valid.iter().copied(), color.stroke_width(2)))?
        .label(format!("{label}, {last:.3} at the end"))
        .legend(move |(x, y)| {
            EmptyElement::at((x, y))
                + PathElement::new(vec![(0, 0), (24, 0)], color.stroke_width(2))
                + Circle::new((12, 0), 4, color.filled())
        });
    chart.draw_series(valid.iter().map(|point| Circle::new(*point, 4, color.filled())))?;
    Ok(())
}

fn draw_legend(chart: &mut LossChart) -> Drawn {
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(12)
        .legend_area_size(34)
        .label_font(text(16))
        .background_style(WHITE.mix(0.9))
        .border_style(GRID)
        .draw()?;
    Ok(())
}

fn draw_codes(canvas: &Canvas, layers: &[(String, [u64; 3])]) -> Drawn {
    let names: Vec<String> = layers.iter().map(|(name, _)| shortened(label(name), 36)).collect();
    let longest = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
    let rows = layers.len().max(1) as f64;
    let mut chart = ChartBuilder::on(canvas)
        .margin(14)
        .margin_top(82)
        .margin_right(76)
        .x_label_area_size(44)
        .y_label_area_size(24 + 8 * longest as u32)
        .build_cartesian_2d(0.0..1.0, 0.0..rows)?;
    let pixel = |x: f64, y: f64| chart.plotting_area().map_coordinate(&(x, y));

    let title = text(22).pos(Pos::new(HPos::Center, VPos::Center));
    canvas.draw_text("Ternary codes by layer", &title, (450, 28))?;
    let (left, top) = pixel(0.0, rows);
    draw_codes_legend(canvas, (left, top))?;
    canvas.draw_text("zeros", &aligned(HPos::Right), (pixel(1.0, rows).0 + 62, top - 18))?;

    for (index, (name, (_, counts))) in names.iter().zip(layers).enumerate() {
        let middle = rows - index as f64 - 0.5;
        let total = counts.iter().sum::<u64>().max(1) as f64;
        let zeros = match counts {
            [0, 0, 0] => "none".into(),
            _ => format!("{:.1} %", 100.0 * counts[1] as f64 / total),
        };
        let (right, y) = pixel(1.0, middle);
        canvas.draw_text(name, &aligned(HPos::Right), (left - 10, y))?;
        canvas.draw_text(&zeros, &aligned(HPos::Right), (right + 62, y))?;
        let mut start = 0.0;
        for (count, (color, _)) in counts.iter().zip(CODES) {
            let end = start + *count as f64 / total;
            let (x, x_end) = (pixel(start, middle).0, pixel(end, middle).0);
            canvas.draw(&Rectangle::new([(x, y - 9), (x_end, y + 9)], color.filled()))?;
            start = end;
        }
    }
    chart
        .configure_mesh()
        .disable_mesh()
        .axis_style(SILVER)
        .y_labels(0)
        .x_labels(11)
        .x_label_formatter(&|share| format!("{:.0} %", 100.0 * share))
        .x_desc("share of the codes")
        .label_style(text(15))
        .axis_desc_style(text(16))
        .draw()?;
    for share in [0.5 - 0.5 * GAUSSIAN_ZEROS, 0.5 + 0.5 * GAUSSIAN_ZEROS] {
        let reference = [(share, 0.0), (share, rows)];
        chart.draw_series(DashedLineSeries::new(reference, 6, 4, INK.stroke_width(2)))?;
    }
    Ok(())
}

/// Draws the colors of the codes and the reference line, above the chart's corner.
fn draw_codes_legend(canvas: &Canvas, (left, top): (i32, i32)) -> Drawn {
    for (index, (color, name)) in CODES.into_iter().enumerate() {
        let x = left + 62 * index as i32;
        canvas.draw(&Rectangle::new([(x, top - 25), (x + 14, top - 11)], color.filled()))?;
        canvas.draw_text(name, &aligned(HPos::Left), (x + 20, top - 18))?;
    }
    let x = left + 62 * CODES.len() as i32;
    for dash in [x, x + 10, x + 20] {
        let line = vec![(dash, top - 18), (dash + 6, top - 18)];
        canvas.draw(&PathElement::new(line, INK.stroke_width(2)))?;
    }
    let reference = format!("{:.1} % zeros: absmean of Gaussian weights", 100.0 * GAUSSIAN_ZEROS);
    canvas.draw_text(&reference, &aligned(HPos::Left), (x + 32, top - 18))?;
    Ok(())
}

/// Draws in memory, then replaces the file as a whole.
fn svg(path: &Path, size: (u32, u32), draw: impl FnOnce(&Canvas) -> Drawn) -> io::Result<()> {
    let mut picture = String::new();
    let canvas = SVGBackend::with_string(&mut picture, size).into_drawing_area();
    let drawn = || -> Drawn {
        canvas.fill(&WHITE)?;
        draw(&canvas)?;
        Ok(canvas.present()?)
    };
    drawn().map_err(|error| io::Error::other(format!("{}: {error}", path.display())))?;
    drop(canvas);
    // A title may hold what XML cannot.
    picture.retain(|character| character == '\n' || !character.is_control());
    write_atomic(path, picture.as_bytes())
}

fn text(size: i32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&INK)
}

fn aligned(horizontal: HPos) -> TextStyle<'static> {
    text(15).pos(Pos::new(horizontal, VPos::Center))
}

/// `0 attention.query` for `transformer.blocks.0.attention.query`.
fn label(name: &str) -> String {
    let block = name.split_once("blocks.").and_then(|(_, rest)| rest.split_once('.'));
    block.map_or(name.into(), |(index, layer)| format!("{index} {layer}"))
}

/// The end of a name that is too long: layers differ there.
fn shortened(name: String, most: usize) -> String {
    let length = name.chars().count();
    if length <= most {
        return name;
    }
    format!("..{}", name.chars().skip(length + 2 - most).collect::<String>())
}

/// Step and loss of the reports that can be drawn.
fn points(reports: &[StepReport]) -> Vec<(usize, f64)> {
    let points = reports.iter().map(|report| (report.step, report.loss));
    points.filter(|(_, loss)| loss.is_finite()).collect()
}

/// From the smallest loss to the largest, with room around.
fn loss_range(losses: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) =
        losses.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), loss| (low.min(loss), high.max(loss)));
    if low > high {
        return 0.0..1.0;
    }
    let room = (0.06 * (high - low)).max(1e-3 * high.abs()).max(1e-6);
    low - room..high + room
}

/// The mean over a window around each point that is a fifteenth of the curve and shrinks towards both ends, so that the
/// average neither lags nor starts late.
fn moving_average(points: &[(usize, f64)]) -> Vec<(usize, f64)> {
    let mut sums = vec![0.0];
    for (_, loss) in points {
        sums.push(sums[sums.len() - 1] + loss);
    }
    let average = |(index, (step, _)): (usize, &(usize, f64))| {
        let half = (points.len() / 30).min(index).min(points.len() - 1 - index);
        let (start, end) = (index - half, index + half + 1);
        (*step, (sums[end] - sums[start]) / (end - start) as f64)
    };
    points.iter().enumerate().map(average).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng;
    use std::fs;

    /// Elements must be closed in order and text must be escaped; that is all of XML that plotters writes.
    fn assert_well_formed(svg: &str) {
        let mut open = Vec::new();
        let mut rest = svg;
        while let Some(start) = rest.find('<') {
            let (content, tag) = rest.split_at(start);
            assert!(!content.contains('>'), "unescaped text {content:?}");
            for entity in content.split('&').skip(1) {
                assert!(["lt;", "gt;", "amp;", "quot;", "apos;"].iter().any(|e| entity.starts_with(e)));
            }
            let end = tag.find('>').expect("a tag ends");
            let body = &tag[1..end];
            assert_eq!(body.matches('"').count() % 2, 0, "{body}");
            let name = body.trim_matches('/').split([' ', '\n']).next().unwrap();
            if body.starts_with('/') {
                assert_eq!(open.pop(), Some(name));
            } else if !body.ends_with('/') {
                open.push(name);
            }
            rest = &tag[end + 1..];
        }
        assert!(open.is_empty() && rest.trim().is_empty());
    }

    /// The number of points of the polyline with this colour and width.
    fn polyline(svg: &str, color: RGBColor, width: u32) -> usize {
        let RGBColor(r, g, b) = color;
        let style = format!(r##"stroke="#{r:02X}{g:02X}{b:02X}" stroke-width="{width}""##);
        let lines = svg.lines().filter(|line| line.starts_with("<polyline") && line.contains(&style));
        let points = |line: &str| line.split("points=").nth(1).unwrap().matches(',').count();
        lines.map(points).max().unwrap_or(0)
    }

    fn curve(steps: usize, every: usize) -> Vec<StepReport> {
        let mut rng = rand::rng();
        let step = |step| StepReport {
            step,
            loss: 1.6 + 3.4 * (-(step as f64) / 120.0).exp() + rng.random_range(-0.15..0.15),
            ..Default::default()
        };
        (every..=steps).step_by(every).map(step).collect()
    }

    /// Plots are kept in the folder that `PLOT_FOLDER` names, if any.
    fn draw(name: &str, draw: impl Fn(&Path) -> io::Result<()>) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = match std::env::var_os("PLOT_FOLDER") {
            Some(folder) => Path::new(&folder).join(name),
            None => folder.path().join(name),
        };
        draw(&path).unwrap();
        let svg = fs::read_to_string(path).unwrap();
        assert_well_formed(&svg);
        svg
    }

    #[test]
    fn the_loss_curve_has_every_finite_point_and_a_legend() {
        let (mut train, mut valid) = (curve(700, 5), curve(700, 100));
        train[3].loss = f64::NAN;
        train[4].loss = f64::INFINITY;
        valid[0].loss = f64::NAN;
        valid[6].loss = 1.75;
        let svg = draw("loss.svg", |path| loss_curve(path, &train, &valid, "duck <tiny> & \u{1b}\"co\""));
        assert!(svg.contains(r#"viewBox="0 0 900 540""#));
        assert_eq!(polyline(&svg, SKY, 1), 138);
        assert_eq!(polyline(&svg, BLUE, 3), 138);
        assert_eq!(polyline(&svg, VERMILLION, 2), 6);
        assert_eq!(svg.matches("<circle").count(), 6 + 1, "points and the legend's");
        for text in ["duck &lt;tiny&gt; &amp; &quot;co", "nats per token", "step", "moving average", "1.750"]
        {
            assert!(svg.contains(text), "{text} is missing");
        }
    }

    #[test]
    fn compared_losses_have_a_line_and_a_legend_per_run() {
        let runs = [("float".to_string(), curve(700, 100)), ("ternary".to_string(), curve(500, 100))];
        let svg = draw("compared.svg", |path| compared_losses(path, &runs, "Shakespeare"));
        assert_eq!((polyline(&svg, BLUE, 2), polyline(&svg, VERMILLION, 2)), (7, 5));
        for (label, valid) in &runs {
            let entry = format!("{label}, {:.3} at the end", valid.last().unwrap().loss);
            assert!(svg.contains(&entry), "{entry} is missing");
        }
        draw("empty.svg", |path| compared_losses(path, &[], ""));
    }

    #[test]
    fn few_or_no_points_still_give_a_picture() {
        let one = curve(1, 1);
        let bad = [StepReport { loss: f64::NAN, ..Default::default() }];
        let huge = [StepReport { loss: 1e300, step: usize::MAX >> 12, ..Default::default() }];
        for (train, valid) in [(&one[..], &[][..]), (&[], &one), (&[], &[]), (&bad, &bad), (&huge, &one)] {
            draw("few.svg", |path| loss_curve(path, train, valid, ""));
        }
        draw("none.svg", |path| code_histogram(path, &[]));
        let error = loss_curve(Path::new("/none/such/loss.svg"), &one, &[], "").unwrap_err();
        assert!(error.to_string().contains("/none/such/loss.svg"), "{error}");
    }

    #[test]
    fn bars_are_as_long_as_the_shares_of_the_codes() {
        let mut layers = vec![("blocks.0.attention.query".to_string(), [345, 310, 345])];
        let long = "a.very.long.name.of.a.module.that.nobody.should.have.in.a.model.feed_forward.up";
        layers.push((long.into(), [100, 700, 200]));
        layers.push(("blocks.1.feed_forward.down".into(), [0, 0, 0]));
        layers.push(("blocks.2.feed_forward.down".into(), [1, 2, u64::MAX / 2]));
        let svg = draw("codes.svg", |path| code_histogram(path, &layers));
        let bars = |color: &str| -> Vec<f64> {
            let bars = svg.lines().filter(|line| line.contains(r#"height="18""#) && line.contains(color));
            let width = |line: &str| {
                line.split("width=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap()
            };
            bars.map(width).collect()
        };
        let (zero, minus, plus) = (bars("#C8CCD2"), bars("#0072B2"), bars("#E69F00"));
        let whole = zero[0] + minus[0] + plus[0];
        for (found, share) in
            [(zero[0], 0.31), (minus[0], 0.345), (zero[1], 0.7), (minus[1], 0.1), (plus[1], 0.2)]
        {
            assert!((found - share * whole).abs() <= 1.0, "{found} of {whole} is not {share}");
        }
        assert!((plus[3] - whole).abs() <= 1.0);
        for text in
            ["0 attention.query", "1 feed_forward.down", "31.0 %", "none", "70.0 %", "..", "feed_forward.up"]
        {
            assert!(svg.contains(text), "{text} is missing");
        }
        assert!(!svg.contains("a.very.long"));
    }

    #[test]
    fn the_moving_average_is_the_mean_of_its_window() {
        let points = points(&curve(400, 1));
        let half = points.len() / 30;
        for (index, (step, mean)) in moving_average(&points).into_iter().enumerate() {
            let half = half.min(index).min(points.len() - 1 - index);
            let window = &points[index - half..=index + half];
            let expected = window.iter().map(|(_, loss)| loss).sum::<f64>() / window.len() as f64;
            assert_eq!(step, points[index].0);
            assert!((mean - expected).abs() < 1e-12);
        }
    }

    #[test]
    fn gaussian_zeros_are_those_of_gaussian_weights() {
        let (mut inside, steps, end) = (0.0, 100_000, 0.5 * (2.0 / std::f64::consts::PI).sqrt());
        for step in 0..steps {
            let x = (step as f64 + 0.5) / steps as f64 * end;
            inside += (-0.5 * x * x).exp() * end / steps as f64;
        }
        let expected = 2.0 * inside / (2.0 * std::f64::consts::PI).sqrt();
        assert!((GAUSSIAN_ZEROS - expected).abs() < 1e-4, "{expected}");
    }
}
