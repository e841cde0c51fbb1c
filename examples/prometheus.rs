//! The counters of a region for Prometheus, through the `metrics` facade, so that any other
//! exporter works too.

use metrics_exporter_prometheus::PrometheusBuilder;
use pagestitch::{Chunk, Region, best_server};
use std::sync::Arc;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The exporter of the program. `PrometheusBuilder::new().install()`, with its feature, would
    // listen on a port.
    let exporter = PrometheusBuilder::new().install_recorder()?;

    let shared: Arc<[u8]> = vec![7; 1 << 20].into();
    let region = Region::builder()
        .name("example")
        .record_latency()
        .chunks((0..16).map(|_| Chunk::from(Arc::clone(&shared))))
        .build(&best_server()?)?;
    let sum: u64 = region.as_slice().iter().step_by(4096).map(|&byte| u64::from(byte)).sum();
    assert_eq!(sum, 7 * (16 << 20) / 4096);

    // On each scrape, or on a timer. The meter outlives the region.
    let meter = region.meter();
    drop(region);
    meter.publish();
    let page = exporter.render();
    println!("{page}");
    assert!(page.contains(r#"pagestitch_pages_staged_total{region="example"}"#));
    assert!(page.contains("# HELP pagestitch_pages_staged_total "));
    assert!(page.contains(r#"pagestitch_fault_seconds{region="example",part="fill",quantile="0.99"}"#));
    Ok(())
}
